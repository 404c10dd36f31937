"""Ranges of the rows of a file, so that two sections can read different parts of it."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Self, TypeVar

from grasp_lightning.errors import ConfigError, DataError

T = TypeVar("T")

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})?")


class RowRange(NamedTuple):
    """Consecutive rows, counted from 0; blank lines of a file do not count.

    Attributes:
        last: Inclusive; None for the last row of the file.
    """

    first: int
    last: int | None

    @classmethod
    def parse(cls, text: str | None, key: str) -> Self:
        """Return the range of ``0-259``, or of ``260-`` for all from 260 on; None: all rows."""
        if text is None:
            return cls(0, None)
        found = _RANGE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{key} {text!r} is not a range of rows; expected the first and the last row, as "
                "in 0-259, or 260- for all from 260 on"
            )
        first, last = int(found[1]), None if found[2] is None else int(found[2])
        if last is not None and last < first:
            raise ConfigError(f"{key} {text!r} ends before it starts")
        return cls(first, last)

    def __str__(self) -> str:
        return f"{self.first}-{'' if self.last is None else self.last}"

    def overlaps(self, other: "RowRange") -> bool:
        """Return whether two ranges of the same file share a row."""
        starts_before_end = other.last is None or self.first <= other.last
        return starts_before_end and (self.last is None or other.first <= self.last)

    def cut(self, rows: Sequence[T], name: str, key: str) -> tuple[T, ...]:
        """Return the rows of the range, at least one; ``name`` and ``key`` are for messages."""
        highest = self.first if self.last is None else self.last
        if highest >= len(rows):
            raise DataError(
                f"{key} {self} is out of range: {name} has {len(rows)} rows, counted from 0"
            )
        return tuple(rows[self.first :] if self.last is None else rows[self.first : highest + 1])


ALL_ROWS = RowRange(0, None)
