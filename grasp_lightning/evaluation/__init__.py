"""What a model is worth (perplexity, tasks) and what it costs (memory, throughput)."""
