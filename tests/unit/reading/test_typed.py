"""Parsed values as dataclasses: what does not fit is named by its key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pytest

from grasp_lightning.errors import PlanError
from grasp_lightning.reading.typed import as_type


class Point(NamedTuple):
    value: float
    error: float | None


@dataclass(frozen=True)
class Inner:
    count: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner | None = None
    shapes: tuple[int, ...] = ()
    points: Mapping[str, Point] = field(default_factory=dict)
    is_done: bool = False
    option: str | int | float | bool | tuple[int, ...] | None = None
    free: Mapping[str, Any] = field(default_factory=dict)


def test_nested_values_become_what_the_annotations_say() -> None:
    content = {
        "name": "x",
        "inner": {"count": 1, "kind": "b"},
        "shapes": [1, 2],
        "points": {"a": {"value": 1.5, "error": None}, "b": [2, 3.0]},
        "is_done": True,
        "option": [1, 2],
        "free": {"a": [1, {"b": 2}]},
    }
    assert as_type(Outer, content, "file") == Outer(
        "x",
        Inner(1, "b"),
        (1, 2),
        {"a": Point(1.5, None), "b": Point(2, 3.0)},
        True,
        (1, 2),
        {"a": [1, {"b": 2}]},
    )
    for option in (True, 1, 1.5, "x", None):
        found = as_type(Outer, {"name": "x", "option": option}, "file").option
        assert (found, type(found)) == (option, type(option))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "expected keys and values, got []"),
        ({}, "name is missing"),
        ({"name": 1}, "name: expected str, got 1"),
        ({"name": "x", "other": 1}, "unknown key other"),
        ({"name": "x", "is_done": "yes"}, "is_done: expected bool, got 'yes'"),
        ({"name": "x", "inner": {"count": True}}, "inner.count: expected int, got True"),
        (
            {"name": "x", "inner": {"count": 1, "kind": "c"}},
            "inner.kind: expected one of ('a', 'b')",
        ),
        ({"name": "x", "shapes": [1, "2"]}, "shapes: expected int, got '2'"),
        ({"name": "x", "shapes": 3}, "shapes: expected a list, got 3"),
        ({"name": "x", "points": [1]}, "points: expected keys and values, got [1]"),
        ({"name": "x", "points": {"a": {"value": 1}}}, "points.a.error is missing"),
        ({"name": "x", "points": {"a": [1]}}, "points.a: expected keys and values, got [1]"),
    ],
)
def test_what_does_not_fit_is_named_by_its_key(content: object, expected: str) -> None:
    with pytest.raises(PlanError) as raised:
        as_type(Outer, content, "file", PlanError, "write it again")
    assert str(raised.value).startswith(f"file: {expected}")
    assert str(raised.value).endswith("; write it again")
