"""What hooks collect while a model runs."""
