"""Commands that use or convert a trained model."""
