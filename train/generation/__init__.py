"""Text from a model: continuations of prompts, and conversations."""
