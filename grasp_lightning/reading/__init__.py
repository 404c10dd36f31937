"""Reads files of the user: one function for each format; every error is one line."""
