"""Dataclasses to plain values of JSON or YAML and back; errors are one line with the key."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from grasp_lightning.errors import DataError, GraspError
from grasp_lightning.reading.text import one_line, told

T = TypeVar("T")
_SCALARS = (str, int, float, bool, NoneType)


def to_plain(value: Any) -> Any:  # noqa: ANN401  any value, and values of JSON
    """Return a dataclass or named tuple as nested dicts and lists."""
    if hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    return [to_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def as_type(
    kind: type[T],
    content: object,
    what: str,
    raises: type[GraspError] = DataError,
    advice: str = "",
    *,
    ignores_unknown: bool = False,
) -> T:
    """Return parsed values as a dataclass; ``ignores_unknown`` skips keys of later versions."""
    try:
        value: T = _Builder(ignores_unknown).build(kind, content, "")
    except _Mismatch as error:
        raise raises(told(f"{what}:", str(error), advice)) from error
    return value


class _Mismatch(Exception):  # noqa: N818  never seen by a caller
    """A value of the wrong type."""


@dataclass(frozen=True)
class _Builder:
    """Builds values of any type; ``key`` is the dotted place of the content."""

    ignores_unknown: bool

    def build(self, kind: Any, content: Any, key: str) -> Any:  # noqa: ANN401  any type, any value
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, UnionType):
            return self._first_that_fits(arguments, content, key)
        if is_dataclass(origin or kind):
            return self._dataclass(origin or kind, arguments, content, key)
        if origin in (Mapping, dict):
            _require(isinstance(content, dict), content, key, "keys and values")
            return {k: self.build(arguments[1], v, _below(key, k)) for k, v in content.items()}
        if origin in (tuple, list, Sequence):
            _require(isinstance(content, list | tuple), content, key, "a list")
            items = [self.build(arguments[0], value, key) for value in content]
            return tuple(items) if origin is tuple else items
        if hasattr(kind, "_fields"):
            return self._named_tuple(kind, content, key)
        return _scalar(kind, content, key)

    def _dataclass(
        self,
        kind: Any,  # noqa: ANN401  a dataclass; a generic one has arguments
        arguments: Sequence[Any],
        content: object,
        key: str,
    ) -> object:
        bound = dict(zip(getattr(kind, "__parameters__", ()), arguments, strict=False))
        kinds = {name: bound.get(hint, hint) for name, hint in get_type_hints(kind).items()}
        needed = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
        members = self._members(kinds, needed, content, key)
        try:
            return kind(**members)
        except ValueError as error:  # from __post_init__
            raise _mismatch(key, one_line(error)) from error

    def _named_tuple(self, kind: Any, content: object, key: str) -> object:  # noqa: ANN401  a type
        """Return a named tuple, which JSON holds as a list or as keys and values."""
        names = kind._fields
        if isinstance(content, list | tuple) and len(content) == len(names):
            content = dict(zip(names, content, strict=True))
        return kind(**self._members(get_type_hints(kind), set(names), content, key))

    def _members(
        self, kinds: Mapping[str, Any], needed: set[str], content: object, key: str
    ) -> dict[str, Any]:  # Any: values of any type
        _require(isinstance(content, dict), content, key, "keys and values")
        assert isinstance(content, dict)  # for the type checker
        for name in sorted(needed - content.keys()):
            raise _Mismatch(f"{_below(key, name)} is missing")
        unknown = [name for name in content if name not in kinds]
        if unknown and not self.ignores_unknown:
            raise _Mismatch(f"unknown key {one_line(_below(key, unknown[0]))}")
        known = {name: kinds[name] for name in content if name in kinds}
        return {n: self.build(kind, content[n], _below(key, n)) for n, kind in known.items()}

    def _first_that_fits(self, kinds: Sequence[Any], content: object, key: str) -> object:
        """Return the value as the first type of a union that fits; the error is the last one's."""
        refusal: _Mismatch | None = None
        for kind in kinds:
            try:
                return self.build(kind, content, key)
            except _Mismatch as error:
                if refusal is None or kind is not NoneType:
                    refusal = error
        assert refusal is not None  # a union has parts
        raise refusal


def _scalar(kind: Any, content: object, key: str) -> object:  # noqa: ANN401  a type
    if get_origin(kind) is Literal:
        _require(content in get_args(kind), content, key, f"one of {get_args(kind)}")
    elif kind in _SCALARS:
        is_one = isinstance(content, int | float if kind is float else kind)
        is_one = is_one and (kind is bool or not isinstance(content, bool))
        _require(is_one, content, key, "null" if kind is NoneType else kind.__name__)
    return content


def _require(is_met: bool, content: object, key: str, expected: str) -> None:
    if not is_met:
        raise _mismatch(key, f"expected {expected}, got {one_line(repr(content))}")


def _mismatch(key: str, reason: str) -> _Mismatch:
    return _Mismatch(f"{one_line(key)}: {reason}" if key else reason)


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
