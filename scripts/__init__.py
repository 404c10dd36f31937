"""Checks of our own, which pre-commit runs."""
