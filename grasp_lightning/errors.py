"""Errors that a caller may handle, each with one clear line of text.

The command line prints that line and exits with code 2; tracebacks are for our own bugs only.
"""

import re

# The part of a URL before its host: a token, or a user with a password.
_CREDENTIALS = re.compile(r"://(?:[^\s/]*|\S*:\S*)@")


class GraspError(Exception):
    """A problem that a caller can handle; says what was expected, what was given, what to do."""

    def __str__(self) -> str:
        """Return the message, without passwords in URLs."""
        return _CREDENTIALS.sub("://***@", super().__str__())


class ConfigError(GraspError):
    """A configuration value that is unknown, of the wrong type, out of range, or without effect."""


class DataError(GraspError):
    """A corpus that cannot be read, or has too little text."""


class ModelError(GraspError):
    """A model that cannot be loaded or does not fit the operation."""


class NumericsError(GraspError):
    """NaN or infinity instead of a finite number, in a named layer or module."""


class OutputError(GraspError):
    """A run folder that cannot be written, or must not be overwritten."""


class Interrupted(Exception):  # noqa: N818  an end that was asked for, not an error
    """A signal ended the run at a safe point; ``has_saved`` tells if a later start can resume."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number = signal_number
        self.has_saved = False


class PlanError(GraspError):
    """A stored plan, or its tensors, that cannot be read or applied."""
