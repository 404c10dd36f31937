"""A grid of methods, sizes, models and seeds: its results, and the files that show them."""
