"""Ranges of the rows of a file, so that two sections can read different parts of it."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Self, TypeVar

from grasp_lightning.errors import ConfigError, DataError

T = TypeVar("T")

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})?")


class RowRange(NamedTuple):
    """Rows that follow each other, counted from 0; blank lines of a file are no rows.

    Attributes:
        first: The first one.
        last: The last one, which belongs to the range; None for the last one of the file.
    """

    first: int
    last: int | None

    @classmethod
    def parse(cls, text: str, key: str) -> Self:
        """Return the range that a text names.

        Args:
            text: ``0-259``, or ``260-`` for all rows from 260 on.
            key: Key of the configuration that holds it, for messages.

        Returns:
            The range.

        Raises:
            ConfigError: If the text names none.
        """
        found = _RANGE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{key} {text!r} is no range of rows; expected the first and the last one, as in "
                "0-259, or 260- for all from 260 on"
            )
        first, last = int(found[1]), None if found[2] is None else int(found[2])
        if last is not None and last < first:
            raise ConfigError(f"{key} {text!r} ends before it begins")
        return cls(first, last)

    def __str__(self) -> str:
        """Return the range as ``parse`` takes it."""
        return f"{self.first}-{'' if self.last is None else self.last}"

    def overlaps(self, other: "RowRange") -> bool:
        """Return whether two ranges share a row.

        Args:
            other: Another range of the same file.

        Returns:
            True if a row is in both.
        """
        starts_before_end = other.last is None or self.first <= other.last
        return starts_before_end and (self.last is None or other.first <= self.last)

    def cut(self, rows: Sequence[T], name: str, key: str) -> tuple[T, ...]:
        """Return the rows of the range.

        Args:
            rows: All rows of a file.
            name: The file, for messages.
            key: Key of the configuration that holds the range, for messages.

        Returns:
            At least one row, in order.

        Raises:
            DataError: If the file has not all of them.
        """
        highest = self.first if self.last is None else self.last
        if highest >= len(rows):
            raise DataError(
                f"{key} {self} is out of range: {name} has {len(rows)} rows, counted from 0"
            )
        return tuple(rows[self.first :] if self.last is None else rows[self.first : highest + 1])


ALL_ROWS = RowRange(0, None)
