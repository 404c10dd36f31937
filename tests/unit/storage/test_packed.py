"""Every field of statistics can be stored and read back, to the bit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.stats.base import Statistics
from grasp_lightning.storage.packed import pack, unpack


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Place:
    layers: tuple[int, ...]
    name: str | None = None


@dataclass(frozen=True)
class Everything:
    by_place: Mapping[Place, Pair]
    by_number: Mapping[int, float]
    spans: Mapping[tuple[int, int], Tensor]
    nested: Mapping[str, Mapping[str, Tensor]]
    share: float | None
    absent: Tensor | None = None


@dataclass(frozen=True)
class Wrong:
    layers: frozenset[int]


def example(kind: Any, seed: int = 0) -> Any:  # noqa: ANN401  any type
    """A value of a type, with something in every container."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return example(inner, seed)
    if kind is Tensor:
        return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    if origin is Mapping:
        return {example(arguments[0], n): example(arguments[1], n + seed) for n in range(2)}
    if origin is tuple:
        kinds = arguments[:1] * 2 if arguments[-1] is Ellipsis else arguments
        return tuple(example(part, seed) for part in kinds)
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        return kind(**{k: example(hint, seed + 1) for k, hint in get_type_hints(kind).items()})
    if kind in (str, int, float):
        return kind(seed) / 3 if kind is float else kind(seed)
    raise AssertionError(f"no example of {kind}: can it be stored? Then add one here")


def assert_same(found: object, expected: object) -> None:
    """Equal types and values, floats and tensors to the bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, Mapping):
        assert isinstance(found, Mapping)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple)
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    else:
        assert found == expected


@pytest.mark.parametrize("kind", [Statistics, Everything])
def test_what_is_read_is_what_was_stored(kind: type) -> None:
    value = example(kind)
    tensors, text = pack(value)
    assert_same(unpack(kind, tensors, text, "file"), value)


def test_empty_statistics_stay_empty() -> None:
    assert_same(unpack(Statistics, *pack(Statistics()), "file"), Statistics())


def test_numbers_that_are_not_finite_are_kept() -> None:
    value = Statistics(removal_losses={"a": math.inf, "b": math.nan})
    found = unpack(Statistics, *pack(value), "file").removal_losses
    assert found["a"] == math.inf
    assert math.isnan(found["b"])


def test_a_field_that_cannot_be_stored_is_named() -> None:
    with pytest.raises(TypeError, match=r"Wrong.layers is a frozenset, which cannot be stored"):
        pack(Wrong(frozenset({1})))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"keys": [["unknown", 1]]}', '{"keys": [["layer_metric", {"tensor": "9"}]]}'],
)
def test_text_that_does_not_fit_is_damaged(text: str) -> None:
    with pytest.raises(PlanError, match=r"^file "):
        unpack(Statistics, {}, text, "file")
