"""What a run keeps on disk: its model, progress, statistics, text and results."""
