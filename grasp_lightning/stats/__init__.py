"""Statistics that hooks collect while a model runs."""
