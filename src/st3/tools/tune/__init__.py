"""Finding settings for a model."""
