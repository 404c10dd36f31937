"""Files of a run: its model, progress, statistics, text and results."""
