"""Prepare a new run: read its options, also from a file, and make its first model."""
