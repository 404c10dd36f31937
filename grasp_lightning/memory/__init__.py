"""The forecast of memory per process, from shapes alone."""
