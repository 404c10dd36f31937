"""Dataclasses as plain values of JSON, and back from what this or a later version wrote."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_plain(value: Any) -> Any:  # noqa: ANN401  any value, and values of JSON
    """Return a dataclass or named tuple as a dict, and what it holds likewise, with lists."""
    if hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def from_plain(kind: type[T], content: object) -> T:
    """Return the dataclass that ``to_plain`` was given; keys that it does not have are ignored.

    Args:
        kind: The dataclass. Its fields are numbers, strings, ``Any``, dataclasses (also generic
            ones), tuples of any length and mappings of these, or one of these or None.
        content: Values of JSON.

    Returns:
        The dataclass; a field that is missing has its default. A missing key is a ``KeyError``, a
        value of another type a ``TypeError``.
    """
    value: T = _read(kind, content)
    return value


def _read(kind: Any, content: Any) -> Any:  # noqa: ANN401  annotations, and values of JSON
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:  # one type, or None
        return None if content is None else _read(arguments[0], content)
    if is_dataclass(origin):
        return _read_fields(origin, arguments, _checked(content, Mapping))
    if origin is Mapping:
        return {k: _read(arguments[1], v) for k, v in _checked(content, Mapping).items()}
    if origin is tuple:
        return tuple(_read(arguments[0], entry) for entry in _checked(content, list | tuple))
    if origin is float:
        return float(_checked(content, int | float))
    return content if origin is Any else _checked(content, origin)


def _read_fields(kind: Any, arguments: tuple[Any, ...], content: Any) -> Any:  # noqa: ANN401  as above
    hints = get_type_hints(kind)
    bound = dict(zip(getattr(kind, "__parameters__", ()), arguments, strict=True))
    values = {
        field.name: _read(bound.get(hints[field.name], hints[field.name]), content[field.name])
        for field in fields(kind)
        if field.name in content or (field.default, field.default_factory) == (MISSING, MISSING)
    }
    return kind(**values)


def _checked(content: Any, kind: Any) -> Any:  # noqa: ANN401  as above
    if not isinstance(content, kind):
        name = getattr(kind, "__name__", str(kind))
        raise TypeError(f"expected {name}, got {type(content).__name__}")
    return content
