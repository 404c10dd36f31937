import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats import linear_time
from grasp_lightning.stats.base import LinearSeconds
from grasp_lightning.stats.linear_time import fitted, linear_seconds, measured_ranks
from tests.conftest import tiny_model


def test_times_on_a_line_give_that_line() -> None:
    cost = fitted(9.0, [10, 20, 40], [3.0, 5.0, 9.0])
    assert cost == pytest.approx(LinearSeconds(dense=9.0, fixed=1.0, per_rank=0.2))


def test_the_line_has_the_least_squared_error() -> None:
    ranks, seconds = [8, 16, 32], [2.0, 2.2, 3.5]
    cost = fitted(1.0, ranks, seconds)

    def error(fixed: float, per_rank: float) -> float:
        return sum((fixed + per_rank * k - t) ** 2 for k, t in zip(ranks, seconds, strict=True))

    least = error(cost.fixed, cost.per_rank)
    for fixed, per_rank in [(0.01, 0.0), (-0.01, 0.0), (0.0, 1e-3), (0.0, -1e-3)]:
        assert error(cost.fixed + fixed, cost.per_rank + per_rank) > least


def test_no_part_of_a_time_is_negative() -> None:
    steep = fitted(9.0, [10, 20], [1.0, 3.0])
    assert steep == pytest.approx(LinearSeconds(dense=9.0, fixed=0.0, per_rank=0.14))
    falling = fitted(9.0, [10, 20], [3.0, 2.0])
    assert falling.per_rank == pytest.approx(1e-3 * 2.5 / 20)
    assert falling.fixed == pytest.approx(2.5, rel=1e-2)
    assert fitted(9.0, [4], [2.0]) == (9.0, 0.0, 0.5)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((576, 576), (64, 136, 280)), ((16, 16), (1, 3, 7)), ((2, 2), (1,)), ((1, 8), (1,))],
)
def test_factors_are_measured_up_to_the_largest_useful_rank(
    shape: tuple[int, int], ranks: tuple[int, ...]
) -> None:
    assert measured_ranks(shape) == ranks


def test_times_are_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(1000))
    monkeypatch.setattr(linear_time, "_seconds", lambda *_: float(next(turns)))
    device = torch.device("cpu")
    first, second = linear_time._medians([lambda: torch.ones(1)] * 2, device)
    assert second - first == 1  # each turn has both
    assert math.isclose(first, 4 + 2 * 3)  # after two calls of each, the fourth of seven turns


def test_every_shape_is_measured_and_random_numbers_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[torch.Size] = []

    def seconds(call: Callable[[], Tensor], *_: object) -> float:
        calls.append(call().shape)
        return 1.0

    monkeypatch.setattr(linear_time, "_seconds", seconds)
    view, shapes = DecoderView(tiny_model()), [(16, 32), (8, 1)]
    state = torch.get_rng_state()
    found = linear_seconds(view, shapes, num_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found) == shapes
    assert all(cost.dense == 1.0 and cost.per_rank > 0 for cost in found.values())
    assert set(calls) == {(5, 16), (5, 8)}
    assert linear_seconds(view, []) == {}


def test_the_first_process_measures_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    received = {(8, 8): LinearSeconds(dense=1.0, fixed=0.0, per_rank=0.1)}
    monkeypatch.setattr("grasp_lightning.processes.on_first", lambda _: received)
    assert linear_seconds(DecoderView(tiny_model()), [(8, 8)]) == received


def test_real_times_are_positive() -> None:
    (cost,) = linear_seconds(DecoderView(tiny_model()), [(64, 64)], num_tokens=32).values()
    assert cost.dense > 0
    assert cost.fixed >= 0
    assert cost.per_rank > 0
