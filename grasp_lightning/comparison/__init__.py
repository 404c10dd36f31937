"""The grid of ``compare``: its cells, their processes, and what is measured on each model."""
