"""Values of JSON or YAML as dataclasses; what does not fit is one line that names the key."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from grasp_lightning.errors import DataError, GraspError
from grasp_lightning.reading.text import one_line, told

T = TypeVar("T")
_SCALARS: dict[Any, tuple[type, ...]] = {  # Any: types
    str: (str,),
    int: (int,),
    float: (int, float),
    bool: (bool,),
    NoneType: (NoneType,),
}


def as_type(
    kind: type[T],
    content: object,
    what: str,
    raises: type[GraspError] = DataError,
    advice: str = "",
) -> T:
    """Return parsed values as a dataclass, with all that it holds; see ``text`` for the rest."""
    try:
        value: T = _built(kind, content, "")
    except _Mismatch as error:
        raise raises(told(f"{what}:", str(error), advice)) from error
    return value


class _Mismatch(Exception):  # noqa: N818  never seen by a caller
    """A value that is not of its type."""


def _built(kind: Any, content: Any, key: str) -> Any:  # noqa: ANN401  any type, any value
    origin = get_origin(kind)
    if origin is Annotated:
        return _built(get_args(kind)[0], content, key)
    if origin in (Union, UnionType):
        return _first_that_fits(get_args(kind), content, key)
    if is_dataclass(kind):
        return _dataclass(kind, content, key)
    if origin is Mapping or origin is dict:
        _require(isinstance(content, dict), content, key, "keys and values")
        value_kind = get_args(kind)[1]
        return {
            name: _built(value_kind, value, _below(key, name)) for name, value in content.items()
        }
    if origin in (tuple, list, Sequence):
        _require(isinstance(content, list | tuple), content, key, "a list")
        items = [_built(get_args(kind)[0], value, key) for value in content]
        return tuple(items) if origin is tuple else items
    return _scalar(kind, content, key)


def _scalar(kind: Any, content: object, key: str) -> object:  # noqa: ANN401  a type
    if get_origin(kind) is Literal:
        _require(content in get_args(kind), content, key, f"one of {get_args(kind)}")
    elif kind in _SCALARS:
        is_one = isinstance(content, _SCALARS[kind]) and (
            kind is bool or not isinstance(content, bool)
        )
        _require(is_one, content, key, "null" if kind is NoneType else kind.__name__)
    elif hasattr(kind, "_fields"):  # a NamedTuple, which JSON has as a list or as keys and values
        names = kind._fields
        if isinstance(content, list | tuple) and len(content) == len(names):
            content = dict(zip(names, content, strict=True))
        return kind(**_members(get_type_hints(kind), set(names), content, key))
    return content


def _dataclass(kind: Any, content: object, key: str) -> object:  # noqa: ANN401  a dataclass
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    return kind(**_members(get_type_hints(kind), needed, content, key))


def _members(
    kinds: Mapping[str, Any],
    needed: set[str],
    content: object,
    key: str,
) -> dict[str, Any]:  # Any: values of any type
    _require(isinstance(content, dict), content, key, "keys and values")
    assert isinstance(content, dict)  # for the type checker
    for name in sorted(needed - content.keys()):
        raise _Mismatch(f"{_below(key, name)} is missing")
    for name in content:
        if name not in kinds:
            raise _Mismatch(f"unknown key {one_line(_below(key, name))}")
    return {name: _built(kinds[name], value, _below(key, name)) for name, value in content.items()}


def _first_that_fits(kinds: Sequence[Any], content: object, key: str) -> object:
    """Return the value as the first type of a union; the error is that of the last one."""
    refusal: _Mismatch | None = None
    for kind in kinds:
        try:
            return _built(kind, content, key)
        except _Mismatch as error:
            if refusal is None or kind is not NoneType:
                refusal = error
    assert refusal is not None  # a union has parts
    raise refusal


def _require(is_met: bool, content: object, key: str, expected: str) -> None:
    if not is_met:
        place = f"{one_line(key)}: " if key else ""
        raise _Mismatch(f"{place}expected {expected}, got {one_line(repr(content))}")


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
