"""Commands that train a model, or plan a run."""
