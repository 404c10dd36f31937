import math
import re
from typing import Any

import pytest
import torch

from grasp_lightning.linalg.allocation import allocate, smallest_size
from grasp_lightning.linalg.choices import ChannelChoice, Choice, GroupChoice, MatrixChoice
from tests.reference.allocation_at import allocation_at

DECAYING = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625])


def matrix(name: str = "a", **fields: object) -> MatrixChoice:
    # Any: fields of several types.
    given: dict[str, Any] = {"shape": (8, 8), "squared_singular_values": DECAYING, **fields}
    return MatrixChoice(name, **given)


def test_ranks_of_two_matrices_by_hand() -> None:
    strong = matrix("strong", squared_singular_values=10 * DECAYING)
    # Six ranks of size 16 are left after rank 1 of both, of gains 40, 20 (dense costs 32 more than
    # rank 2 and gains 37.5 more) and 4, 2.
    assert allocate([matrix("weak"), strong], 32).ranks == {"strong": 1, "weak": 1}
    assert allocate([matrix("weak"), strong], 48).ranks == {"strong": 2, "weak": 1}
    allocation = allocate([matrix("weak"), strong], 64 + 16)
    assert (allocation.ranks, allocation.dense) == ({"weak": 1}, ("strong",))
    assert allocation.size == 80
    assert allocation.loss == float(DECAYING[1:].sum())


def test_more_than_everything_dense_keeps_it_dense() -> None:
    allocation = allocate([matrix("b"), matrix("a")], 1e9)
    assert allocation.dense == ("a", "b")
    assert (allocation.ranks, allocation.removed) == ({}, ())
    assert (allocation.size, allocation.loss, allocation.loss_bound) == (128, 0, 0)
    assert allocation.multiplier == 0
    assert allocate([matrix("b"), matrix("a")], math.inf) == allocation


def test_budget_below_the_smallest_allocation_is_refused() -> None:
    message = (
        "the budget must be at least 21, the smallest size that these choices allow, and at most "
        "133 is of use, got 20.5"
    )
    choices = [
        GroupChoice("block", [matrix("a")], own_size=5),
        GroupChoice("other", [matrix("b")], removal_loss=1e6),
    ]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        allocate(choices, 20.5)
    assert allocate(choices, 21).removed == ("other",)
    with pytest.raises(ValueError, match=r"got nan$"):
        allocate(choices, math.nan)


def test_removed_group_takes_what_is_inside_with_it() -> None:
    inner = GroupChoice("inner", [matrix("b")], removal_loss=3.0)
    outer = GroupChoice("outer", [matrix("a"), inner], removal_loss=5.0, own_size=9)
    allocation = allocate([outer, matrix("c")], 20)
    assert allocation.removed == ("outer",)
    assert allocation.ranks == {"c": 1}
    assert allocation.loss == 5 + float(DECAYING[1:].sum())


def test_cheap_group_is_removed_before_ranks_are_cut() -> None:
    cheap = GroupChoice("cheap", [matrix("a")], removal_loss=0.001)
    dear = GroupChoice("dear", [matrix("b")], removal_loss=100.0)
    allocation = allocate([cheap, dear], 64)
    assert (allocation.removed, allocation.dense) == (("cheap",), ("b",))
    assert allocation.loss == 0.001


def test_group_that_only_harms_is_removed_at_any_budget() -> None:
    allocation = allocate([GroupChoice("g", [matrix()], removal_loss=-2.0)], 64)
    assert (allocation.removed, allocation.size, allocation.loss) == (("g",), 0, -2)


def test_values_past_the_rank_of_a_matrix_are_not_paid_for() -> None:
    low_rank = torch.tensor([3.0, 1.0])
    allocation = allocate([matrix(shape=(100, 100), squared_singular_values=low_rank)], 10_000)
    assert (allocation.ranks, allocation.loss, allocation.size) == ({"a": 2}, 0, 400)


def test_matrix_without_a_rank_that_saves_size_stays_dense() -> None:
    choices = [
        matrix("thin", shape=(1, 8), squared_singular_values=torch.ones(1)),
        matrix("few", multiple_of=8),
    ]
    assert allocation_at(choices, math.inf).dense == ("few", "thin")


def test_smallest_size_is_the_smallest_budget_that_is_taken() -> None:
    choices: list[Choice] = [
        matrix("a", shape=(64, 64), multiple_of=2),
        ChannelChoice("mlp", 1.5, torch.ones(4), min_channels=3),
    ]
    least = smallest_size(choices)
    assert least == 2 * 128 + 4.5
    assert allocate(choices, least).size == least


def test_channels_and_ranks_share_a_budget() -> None:
    mlp = ChannelChoice("mlp", 16, torch.tensor([9.0, 6.0, 3.0, 0.5]))
    # One rank and one channel are the least; the others are worth 6, 3, 0.5 and 4, 2 of size 16.
    allocation = allocate([mlp, matrix()], 32)
    assert (allocation.channels, allocation.ranks) == ({"mlp": 1}, {"a": 1})
    allocation = allocate([mlp, matrix()], 64)
    assert (allocation.channels, allocation.ranks) == ({"mlp": 2}, {"a": 2})
    allocation = allocate([mlp, matrix()], 80)
    assert (allocation.channels, allocation.ranks) == ({"mlp": 3}, {"a": 2})
    assert (allocation.size, allocation.loss) == (80, 0.5 + float(DECAYING[2:].sum()))
    assert allocate([mlp, matrix()], 64 + 64).dense == ("a", "mlp")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            [ChannelChoice("a", 3, torch.tensor([1.0, 2.0]))],
            "losses of a must be descending",
        ),
        (
            [ChannelChoice("a", 0, torch.ones(2))],
            "channel_size of a must be positive and finite, got 0",
        ),
        ([matrix(), matrix()], "matrices and groups need distinct names, got 'a' twice"),
        (
            [GroupChoice("a", [matrix()])],
            "matrices and groups need distinct names, got 'a' twice",
        ),
        (
            [matrix(squared_singular_values=torch.tensor([1.0, math.nan]))],
            (
                "squared_singular_values of a must be a vector of finite numbers that are not "
                "negative, got shape (2,)"
            ),
        ),
        (
            [matrix(squared_singular_values=torch.ones(2, 2))],
            (
                "squared_singular_values of a must be a vector of finite numbers that are not "
                "negative, got shape (2, 2)"
            ),
        ),
        (
            [matrix(squared_singular_values=torch.tensor([1.0, 2.0]))],
            "squared_singular_values of a must be descending",
        ),
        ([matrix(min_rank=0)], "min_rank of a must be at least 1, got 0"),
        ([matrix(multiple_of=0)], "multiple_of of a must be at least 1, got 0"),
        (
            [matrix(shape=(0, 3))],
            "a linear needs at least one output and one input, got 0 x 3",
        ),
        (
            [GroupChoice("g", [matrix()], removal_loss=math.nan)],
            (
                "g must have a finite removal_loss or None, got nan, and finite own_size "
                "and removed_size of at least 0, got 0.0 and 0.0"
            ),
        ),
        (
            [GroupChoice("g", [matrix()], own_size=-1.0)],
            (
                "g must have a finite removal_loss or None, got None, and finite own_size "
                "and removed_size of at least 0, got -1.0 and 0.0"
            ),
        ),
    ],
)
def test_malformed_choices_are_refused(
    choices: list[MatrixChoice | GroupChoice], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        allocate(choices, 100)


def test_budget_of_a_7b_model_is_spent_to_a_thousandth() -> None:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    generator = torch.Generator().manual_seed(0)
    decay = torch.exp(-torch.arange(4096) / 400).double()
    groups = []
    for j in range(32):
        noise = 1 + torch.rand(4096, generator=generator).sort(descending=True).values
        matrices = [
            MatrixChoice(f"{j}.{i}", shape, noise * decay, multiple_of=8)
            for i, shape in enumerate(shapes)
        ]
        groups.append(GroupChoice(f"{j}", matrices, removal_loss=100.0 * (j + 1)))
    total = 32 * sum(m * n for m, n in shapes)
    for share in (0.8, 0.5):
        allocation = allocate(groups, share * total)
        assert (share - 0.001) * total <= allocation.size <= share * total
        assert allocation.loss - allocation.loss_bound <= 0.01 * allocation.loss
        assert all(rank % 8 == 0 for rank in allocation.ranks.values())
