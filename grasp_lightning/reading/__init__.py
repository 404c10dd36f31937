"""Reads files of the user: one function for each format, whose every error is one line."""
