"""One width for all MLPs, against all widths and removals, listed one by one."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.linalg.choices import ChannelChoice, Choice, GroupChoice, MatrixChoice
from grasp_lightning.linalg.shared_width import allocate_shared, smallest_shared_size

quick = settings(max_examples=100, deadline=None)
prices = st.one_of(st.sampled_from([0.0, 1.0, 2.0, -1.0]), st.floats(1e-3, 20))


class Layer(NamedTuple):
    """A layer with one MLP of channels of size 2, and how it is removed."""

    losses: tuple[float, ...]
    own_size: float
    price: float | None


@st.composite
def models(draw: st.DrawFn, own_sizes: tuple[float, ...]) -> tuple[list[Layer], int]:
    num_channels, unit = draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 2]))
    losses = st.lists(st.floats(0, 10), min_size=num_channels, max_size=num_channels)
    layers = [
        Layer(
            losses=tuple(sorted(draw(losses), reverse=True)),
            own_size=draw(st.sampled_from(own_sizes)),
            price=draw(st.one_of(st.none(), prices)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    return layers, unit


def choices(layers: Sequence[Layer], unit: int) -> list[Choice]:
    found: list[Choice] = []
    for j, layer in enumerate(layers):
        losses = torch.tensor(layer.losses, dtype=torch.float64)
        mlp = ChannelChoice(f"mlp{j}", 2.0, losses, multiple_of=unit)
        attention = MatrixChoice(f"attention{j}", (3, 3), torch.ones(3), max_rank=0)
        parts: list[Choice] = [mlp, attention]
        group = GroupChoice(f"layer{j}", parts, layer.price, layer.own_size)
        found += [group] if layer.price is not None else [GroupChoice(f"fixed{j}", parts)]
    return found


def outcomes(layers: Sequence[Layer], unit: int) -> list[tuple[float, float]]:
    """Size and loss of every width with every set of removed layers."""
    total = len(layers[0].losses)
    widths = [*(k for k in range(1, total) if k % unit == 0), total]
    found = []
    for width in widths:
        parts = []
        for layer in layers:
            own = 0.0 if layer.price is None else layer.own_size
            kept = (own + 9 + 2 * width, math.fsum(layer.losses[width:]))
            parts.append([kept] if layer.price is None else [kept, (0.0, layer.price)])
        pairs = (zip(*combined, strict=True) for combined in itertools.product(*parts))
        found += [(math.fsum(sizes), math.fsum(losses)) for sizes, losses in pairs]
    return found


def budget_at(layers: Sequence[Layer], unit: int, share: float) -> float:
    sizes = [size for size, _ in outcomes(layers, unit)]
    return min(sizes) + share * (max(sizes) - min(sizes))


def is_close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-9)


@quick
@given(models(own_sizes=(1.0,)), st.floats(0, 1))
def test_layers_of_one_size_get_the_best_width_and_the_best_removals(
    model: tuple[list[Layer], int], share: float
) -> None:
    layers, unit = model
    removable = [layer._replace(price=layer.price or 0.5) for layer in layers]
    for kind in (removable, [layer._replace(price=None) for layer in layers]):
        budget = budget_at(kind, unit, share)
        best = min(loss for size, loss in outcomes(kind, unit) if size <= budget)
        assert is_close(allocate_shared(choices(kind, unit), budget).loss, best)


@quick
@given(models(own_sizes=(0.0, 1.0, 25.0)), st.floats(0, 1))
def test_the_budget_is_kept_and_the_loss_is_near_the_best(
    model: tuple[list[Layer], int], share: float
) -> None:
    layers, unit = model
    budget = budget_at(layers, unit, share)
    allocation = allocate_shared(choices(layers, unit), budget)
    possible = outcomes(layers, unit)
    assert allocation.size <= budget
    assert any(is_close(allocation.size, s) and is_close(allocation.loss, x) for s, x in possible)
    best = min(loss for size, loss in possible if size <= budget)
    assert allocation.loss_bound <= best + 1e-9
    assert best <= allocation.loss + 1e-9
    assert len(set(allocation.channels.values())) <= 1
    assert is_close(smallest_shared_size(choices(layers, unit)), min(size for size, _ in possible))
