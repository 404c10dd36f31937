"""Reads what a user gave: one function for each kind of file, whose every error is one line."""
