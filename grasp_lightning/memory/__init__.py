"""Forecast of the memory per process, from shapes alone."""
