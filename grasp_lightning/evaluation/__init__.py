"""Quality of a model (perplexity, tasks) and its cost (memory, throughput)."""
