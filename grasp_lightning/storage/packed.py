"""Values with tensors inside, taken apart into named tensors and a JSON text, and built again."""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.reading.text import parse_json
from grasp_lightning.reading.typed import to_plain

T = TypeVar("T")
_TENSOR: Final = "tensor"
_KEYS: Final = "keys"
_EXPECTED: Final = (
    "expected tensors, numbers, text, and tuples, mappings, named tuples or dataclasses of these"
)


def pack(value: object) -> tuple[dict[str, Tensor], str]:
    """Return the tensors in a dataclass by number, and a text in which these numbers stand.

    Anything else than plain values, tensors and containers of them is a ``TypeError``.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_packed(to_plain(value), type(value).__name__, tensors))


def unpack(kind: type[T], tensors: Mapping[str, Tensor], text: str, what: str) -> T:
    """Return the dataclass that ``pack`` took apart.

    Args:
        what: Names its file in a message.

    Raises:
        PlanError: If the text or the tensors do not fit the dataclass.
    """
    packed = parse_json(text, what, PlanError, is_strict=False)
    try:
        value: T = _built(kind, packed, tensors)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise PlanError(f"{what} is damaged: it does not hold {kind.__name__}") from error
    return value


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401  JSON
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):  # keys need not be text
        pairs = ((_packed(to_plain(key), place, tensors), key, part) for key, part in value.items())
        return {_KEYS: [[key, _packed(part, f"{place}.{of}", tensors)] for key, of, part in pairs]}
    if isinstance(value, list):
        return [_packed(part, place, tensors) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}, which cannot be stored: {_EXPECTED}")


def _built(kind: Any, packed: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401  any type
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if packed is None else _built(inner, packed, tensors)
    if kind is Tensor:
        return tensors[packed[_TENSOR]]
    if origin in (Mapping, dict):
        of_key, of_value = arguments
        pairs = packed[_KEYS]
        return {_built(of_key, k, tensors): _built(of_value, v, tensors) for k, v in pairs}
    if origin is tuple:
        kinds = arguments[:1] * len(packed) if arguments[-1] is Ellipsis else arguments
        return tuple(_built(*part, tensors) for part in zip(kinds, packed, strict=True))
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = get_type_hints(kind)
        return kind(**{name: _built(hints[name], part, tensors) for name, part in packed[_KEYS]})
    return packed
