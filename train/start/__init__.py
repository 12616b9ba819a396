"""What a new run starts from: its options, also in a file, and its model."""
