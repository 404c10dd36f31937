import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.curvature import gram_sum, square_sum, squared_gradient_sum

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
float_dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def random(*shape: int, seed: int) -> Tensor:
    """Values with a mean, as activations have, so that sums grow with the number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 1


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@quick
@given(st.integers(1, 3000), st.integers(1, 8), seeds, float_dtypes, st.booleans())
def test_gram_equals_the_float64_one(
    num_tokens: int, num_inputs: int, seed: int, dtype: torch.dtype, is_weighted: bool
) -> None:
    x = random(num_tokens, num_inputs, seed=seed).to(dtype)
    weights = random(num_tokens, seed=seed + 1).abs() if is_weighted else None
    rows = x.double()
    weighted = rows if weights is None else rows * weights[:, None]
    gram = gram_sum(x, weights)
    assert gram.dtype == torch.float64
    assert relative_error(gram, weighted.mT @ rows) < 1e-6
    diagonal = gram.diagonal()
    torch.testing.assert_close(square_sum(x, weights), diagonal, rtol=1e-5, atol=1e-12)


@quick
@given(st.lists(st.integers(0, 1500), min_size=1, max_size=6), seeds, float_dtypes)
def test_gram_does_not_depend_on_how_tokens_are_split(
    lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    x = random(sum(lengths) + 1, 6, seed=seed).to(dtype)
    batches = x.split([*lengths, 1])
    total = torch.stack([gram_sum(batch) for batch in batches]).sum(dim=0)
    assert relative_error(total, gram_sum(x)) < 1e-6


@quick
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), seeds)
def test_squared_gradients_are_those_of_every_token(
    num_tokens: int, rows: int, columns: int, seed: int
) -> None:
    x, grad_output = random(num_tokens, columns, seed=seed), random(num_tokens, rows, seed=seed + 1)
    expected = sum(torch.outer(g, x_t).square() for g, x_t in zip(grad_output, x, strict=True))
    torch.testing.assert_close(squared_gradient_sum(x, grad_output), expected)
