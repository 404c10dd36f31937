import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.layers import angular_distance_sum, cosine_sum
from tests.reference.definitions import block_influence
from tests.reference.naive_similarity import (
    naive_angular_distance_sum,
    naive_block_influence,
    naive_cosine_sum,
)

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
# Share of the layer's own contribution in its output: from nearly nothing to nearly all.
turns = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
FUNCTIONS = (cosine_sum, angular_distance_sum, block_influence)


def hidden_states(
    seed: int, turn: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw states of 3 windows of 5 tokens, and a mask with at least one real token."""
    generator = torch.Generator().manual_seed(seed)
    hidden_in = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    mask[1, 2] = True
    return hidden_in.to(dtype), (hidden_in + turn * noise).to(dtype), mask


@quick
@given(seeds, turns, dtypes)
def test_sums_and_influence_equal_the_naive_loop(
    seed: int, turn: float, dtype: torch.dtype
) -> None:
    states = hidden_states(seed, turn, dtype)
    assert float(cosine_sum(*states)) == pytest.approx(naive_cosine_sum(*states), abs=1e-5)
    assert float(block_influence(*states)) == pytest.approx(
        naive_block_influence(*states), abs=1e-6
    )
    # The angle near 0 is the square root of the distance of the cosine from 1.
    assert float(angular_distance_sum(*states)) == pytest.approx(
        naive_angular_distance_sum(*states), abs=1e-3
    )


@quick
@given(seeds, turns)
def test_float64_states_are_compared_in_float64(seed: int, turn: float) -> None:
    states = hidden_states(seed, turn, torch.float64)
    assert float(cosine_sum(*states)) == pytest.approx(naive_cosine_sum(*states), abs=1e-12)
    assert float(angular_distance_sum(*states)) == pytest.approx(
        naive_angular_distance_sum(*states), abs=1e-6
    )


@quick
@given(seeds, turns)
def test_padding_does_not_count(seed: int, turn: float) -> None:
    hidden_in, hidden_out, mask = hidden_states(seed, turn)
    other_in, other_out = hidden_in.clone(), hidden_out.clone()
    other_in[~mask], other_out[~mask] = float("nan"), float("inf")
    for function in FUNCTIONS:
        assert torch.equal(
            function(hidden_in, hidden_out, mask), function(other_in, other_out, mask)
        )


@quick
@given(seeds, turns, st.integers(1, 4))
def test_sums_do_not_depend_on_the_padded_length(seed: int, turn: float, extra: int) -> None:
    hidden_in, hidden_out, mask = hidden_states(seed, turn)
    junk = torch.ones(3, extra, 8)
    padded = (
        torch.cat([hidden_in, junk], dim=1),
        torch.cat([hidden_out, -junk], dim=1),
        torch.cat([mask, torch.zeros(3, extra, dtype=torch.bool)], dim=1),
    )
    for function in FUNCTIONS:
        torch.testing.assert_close(
            function(*padded), function(hidden_in, hidden_out, mask), rtol=1e-12, atol=1e-12
        )


@quick
@given(seeds, turns)
def test_sums_add_up_over_windows(seed: int, turn: float) -> None:
    states = hidden_states(seed, turn)
    for function in (cosine_sum, angular_distance_sum):
        parts = [function(*(part[i : i + 1] for part in states)) for i in range(3)]
        torch.testing.assert_close(torch.stack(parts).sum(), function(*states))


@quick
@given(seeds, turns, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scale_of_the_states_does_not_matter(
    seed: int, turn: float, scale_in: float, scale_out: float
) -> None:
    hidden_in, hidden_out, mask = hidden_states(seed, turn, torch.float64)
    scaled = (hidden_in * scale_in, hidden_out * scale_out, mask)
    torch.testing.assert_close(
        cosine_sum(*scaled), cosine_sum(hidden_in, hidden_out, mask), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        block_influence(*scaled), block_influence(hidden_in, hidden_out, mask)
    )


@quick
@given(seeds, turns, dtypes)
def test_values_stay_in_range_and_finite(seed: int, turn: float, dtype: torch.dtype) -> None:
    hidden_in, hidden_out, mask = hidden_states(seed, turn, dtype)
    num_tokens = int(mask.sum())
    for other in (hidden_out, hidden_in, -hidden_in, 3 * hidden_in):
        assert 0 <= float(block_influence(hidden_in, other, mask)) <= 2
        assert 0 <= float(angular_distance_sum(hidden_in, other, mask)) <= num_tokens
        assert abs(float(cosine_sum(hidden_in, other, mask))) <= num_tokens


@quick
@given(seeds, dtypes)
def test_identity_and_reversal_are_exact(seed: int, dtype: torch.dtype) -> None:
    hidden, _, mask = hidden_states(seed, dtype=dtype)
    num_tokens = float(mask.sum())
    assert float(block_influence(hidden, hidden, mask)) == 0
    assert float(block_influence(hidden, -hidden, mask)) == 2
    assert float(cosine_sum(hidden, hidden, mask)) == num_tokens
    assert float(angular_distance_sum(hidden, hidden, mask)) == 0
    assert float(angular_distance_sum(hidden, -hidden, mask)) == num_tokens
