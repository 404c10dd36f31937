"""What a run keeps on disk for itself: progress, statistics, text and results."""
