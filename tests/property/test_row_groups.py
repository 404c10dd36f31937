"""Groups of rows: their sizes, their losses, and their factors."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.row_groups import (
    frequency_groups,
    group_sizes,
    row_factors,
    row_losses,
    smoothed_frequencies,
)
from grasp_lightning.linalg.weightings import damped_root, weighted_svd

SIZES = st.integers(2, 24)
SEEDS = st.integers(0, 2**16)


def group(num_rows: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, inputs = (
        torch.randn(n, features, generator=generator, dtype=torch.float64)
        for n in (num_rows, 2 * features)
    )
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.01
    return rows, weights, damped_root(inputs.mT @ inputs, 1e-3)


@given(SIZES, SIZES, SEEDS)
def test_losses_are_the_squared_singular_values_of_whitened_rows(
    num_rows: int, features: int, seed: int
) -> None:
    rows, weights, root = group(num_rows, features, seed)
    expected = weighted_svd(rows, weights.sqrt(), root).s.square()
    torch.testing.assert_close(
        row_losses(rows, weights, root), expected, rtol=1e-6, atol=1e-9 * float(expected[0])
    )


@given(SIZES, SIZES, SEEDS, st.data())
def test_factors_cost_what_they_drop(
    num_rows: int, features: int, seed: int, data: st.DataObject
) -> None:
    rows, weights, root = group(num_rows, features, seed)
    losses = row_losses(rows, weights, root)
    rank = data.draw(st.integers(1, len(losses)))
    left, right = row_factors(rows, weights, root, rank)
    error = weights.sqrt()[:, None] * (rows - left @ right) @ root
    torch.testing.assert_close(
        error.square().sum(), losses[rank:].sum(), rtol=1e-6, atol=1e-9 * float(losses.sum())
    )
    if rank == len(losses):
        torch.testing.assert_close(left @ right, rows, rtol=1e-6, atol=1e-7)


@given(st.integers(1, 300), st.data())
def test_groups_hold_every_token_once_and_special_ones_in_the_first(
    num_tokens: int, data: st.DataObject
) -> None:
    special = sorted(data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=40)))
    counts = torch.randint(0, 4, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    frequencies = smoothed_frequencies(counts)
    assert bool((frequencies > 0).all())
    assert abs(float(frequencies.sum()) - 1) < 1e-9
    groups = frequency_groups(frequencies, torch.tensor(special, dtype=torch.int64))
    sizes = torch.bincount(groups, minlength=6).tolist()
    assert sizes == list(group_sizes(num_tokens, len(special)))
    assert bool((groups[special] == 0).all())
    ordinary = torch.tensor([token not in special for token in range(num_tokens)])
    parts = [frequencies[ordinary & (groups == number)] for number in range(6)]
    ends = [(float(part.min()), float(part.max())) for part in parts if len(part)]
    assert all(more[0] >= fewer[1] for more, fewer in pairwise(ends))
