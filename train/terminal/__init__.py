"""What a run shows in a terminal: progress bars, and lines that never stop it."""
