"""Allowed values, declared at each key of the configuration and checked in one place."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import one_line, user_path

_MOST_BITS = 1024  # of a number that is shown
_FINITE = "must be a finite number"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600}
_MOST = 2**31 - 1  # of a count whose key declares no other bound


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that a key takes, shown in ``--help``; ``claim`` describes negative ones outside."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    claim: str | None = None

    def __contains__(self, value: float) -> bool:
        """Return whether a number is in the range; NaN never is."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __repr__(self) -> str:
        """Return the bounds in words."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{name} {value}" for name, value in bounds if value is not None)


@dataclass(frozen=True)
class _Path:
    """Marks a text that may be the path of a file or a folder."""

    def __repr__(self) -> str:
        """Return what the help of a command shows."""
        return "path"


@dataclass(frozen=True)
class _Duration:
    """Marks a text that is a time: a number and its unit, ``s``, ``m`` or ``h``."""

    def __repr__(self) -> str:
        """Return what the help of a command shows."""
        return "time, such as 90s, 30m or 2h"


PathName = Annotated[str, _Path()]
Duration = Annotated[str, _Duration()]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
Share = Annotated[float, Range(above=0, at_most=1)]
Count = Annotated[int, Range(at_least=1)]
CountOrZero = Annotated[int, Range(at_least=0)]
WindowLength = Annotated[int, Range(at_least=2)]  # a token to predict, and one before it
LibrarySeed = Annotated[int, Range(at_least=0), Range(at_most=2**32 - 1)]  # numpy takes no more
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]


def check_values(config: Any, prefix: str = "") -> None:  # noqa: ANN401  a dataclass is no type
    """Refuse values that no command can use, whatever the other keys say.

    Numbers must be finite, in the range of their key, and not absurdly large; texts UTF-8 without
    NUL bytes; paths possible file names. ``prefix`` goes before the keys in messages.

    Raises:
        ConfigError: With the key, the expected values, and the given one.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_values(value, f"{key}.")
            continue
        if isinstance(value, Mapping):
            for name, section in value.items():
                check_values(section, f"{key}.{name}.")
            continue
        marks = list(_marks(hints[field.name]))
        for part in value if isinstance(value, tuple) else (value,):
            claim = _refusal(part, key, marks)
            if claim is not None:
                if isinstance(value, tuple):
                    claim = claim.replace(_FINITE, "must hold finite numbers")
                    claim = claim.replace("must be above", "must hold numbers above")
                    claim = claim.replace("must be", "must hold numbers of")
                raise ConfigError(f"{key} {claim}, got {_shown(part)}")


def seconds_of(duration: str) -> float:
    """Return the seconds of a ``Duration``, such as ``90s``, ``30m`` or ``1.5h``.

    Raises:
        ValueError: If it is none, or not above 0.
    """
    match = _DURATION.fullmatch(duration)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= _MOST:
        raise ValueError(f"expected a time such as 90s, 30m or 2h, got {duration!r}")
    return seconds


def is_path(kind: Any) -> bool:  # noqa: ANN401  a type annotation
    """Return whether a key takes a path, or several."""
    return any(isinstance(mark, _Path) for mark in _marks(kind))


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python refuses to write it
        return f"a number of {value.bit_length()} bits"
    return one_line(repr(value))


def _marks(kind: Any) -> Iterator[object]:  # noqa: ANN401  a type annotation
    """Yield the declarations in an annotation, including the parts of a union or list."""
    if get_origin(kind) is Annotated:
        yield from kind.__metadata__
    for part in get_args(kind):
        yield from _marks(part)


def _refusal(value: object, key: str, marks: list[object]) -> str | None:
    """Return what is wrong with a value, None if nothing is."""
    if isinstance(value, str):
        return _text_refusal(value, key, marks)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    ranges = [mark for mark in marks if isinstance(mark, Range)]
    if isinstance(value, float) and (math.isinf(value) or (math.isnan(value) and not ranges)):
        return _FINITE
    for allowed in ranges:
        if value not in allowed:
            return (allowed.claim if value < 0 else None) or f"must be {allowed}"
    is_bounded = any(allowed.at_most is not None for allowed in ranges)
    if isinstance(value, int) and not is_bounded and abs(value) > _MOST:
        return f"must be at most {_MOST}" if value > 0 else f"must be at least -{_MOST}"
    return None


def _text_refusal(value: str, key: str, marks: list[object]) -> str | None:
    if "\0" in value:
        return "contains a NUL byte"
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        return "is not UTF-8 text"
    if any(isinstance(mark, _Path) for mark in marks):
        user_path(value, key, ConfigError)
    if any(isinstance(mark, _Duration) for mark in marks):
        try:
            seconds_of(value)
        except ValueError:
            return "must be a time such as 90s, 30m or 2h"
    return None
