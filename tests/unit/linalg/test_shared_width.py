import math

import pytest
import torch

from grasp_lightning.linalg.allocation import allocate
from grasp_lightning.linalg.choices import ChannelChoice, Choice, GroupChoice, MatrixChoice
from grasp_lightning.linalg.shared_width import allocate_shared


def mlp(name: str, *losses: float, multiple_of: int = 1) -> ChannelChoice:
    return ChannelChoice(name, 10.0, torch.tensor(losses), multiple_of=multiple_of)


def dense(name: str) -> MatrixChoice:
    return MatrixChoice(name, (4, 4), torch.ones(4), max_rank=0)


def test_all_mlps_keep_the_same_number_of_channels() -> None:
    # Each for itself, the first would keep all channels, and the second would lose them.
    choices: list[Choice] = [mlp("a", 9, 8, 7, 6), mlp("b", 4, 3, 2, 1), dense("attention")]
    allocation = allocate_shared(choices, 16 + 50)
    assert allocation.channels == {"a": 2, "b": 2}
    assert allocation.dense == ("attention",)
    assert (allocation.size, allocation.loss, allocation.loss_bound) == (56, 16, 16)
    assert allocate(choices, 16 + 50).channels == {"b": 1}


def test_a_budget_for_everything_leaves_all_dense() -> None:
    allocation = allocate_shared([mlp("a", 2, 1), mlp("b", 2, 1)], 40)
    assert (allocation.channels, allocation.dense, allocation.loss) == ({}, ("a", "b"), 0)


def test_a_removed_layer_lets_the_others_stay_wide() -> None:
    layers: list[Choice] = [
        GroupChoice(f"layer{j}", [mlp(f"m{j}", 9, 8, 7), dense(f"d{j}")], price, own_size=4)
        for j, price in enumerate([5.0, 30.0, 4.0])
    ]
    allocation = allocate_shared(layers, 2 * 50)
    assert allocation.removed == ("layer2",)
    assert allocation.dense == ("d0", "d1", "m0", "m1")
    assert (allocation.size, allocation.loss) == (100, 4)


def test_widths_are_multiples() -> None:
    allocation = allocate_shared([mlp("a", *range(70, 0, -1), multiple_of=32)], 690)
    assert allocation.channels == {"a": 64}


@pytest.mark.parametrize(
    ("choices", "budget", "message"),
    [
        ([mlp("a", 2, 1), mlp("b", 2, 1)], 19, "must be at least 20, the smallest size with one"),
        ([mlp("a", 2, 1)], math.nan, "must be at least 10"),
        ([mlp("a", 2, 1), mlp("b", 3, 2, 1)], 50, "the same numbers of channels, got 2 different"),
        ([dense("a")], 50, "the same numbers of channels, got 0 different"),
        (
            [GroupChoice("outer", [GroupChoice("inner", [mlp("a", 2, 1)])])],
            50,
            "outer has a group inside",
        ),
    ],
)
def test_what_cannot_share_a_width_is_refused(
    choices: list[Choice], budget: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_shared(choices, budget)
