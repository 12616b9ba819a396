"""Output to a terminal: progress bars and lines. A terminal that is gone does not stop a run."""
