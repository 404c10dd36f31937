from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.factors import balanced_factors, factorize

quick = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def random_weight(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


@quick
@given(sizes, sizes, seeds)
def test_full_rank_factors_reproduce_the_weight(rows: int, columns: int, seed: int) -> None:
    weight = random_weight(rows, columns, seed)
    left, right = balanced_factors(factorize(weight), range(min(rows, columns)))
    torch.testing.assert_close(left @ right, weight, rtol=1e-10, atol=1e-12)


@quick
@given(sizes, sizes, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_full_rank_factors_reproduce_low_precision_weights_to_float32(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    weight = random_weight(rows, columns, seed, dtype)
    left, right = balanced_factors(factorize(weight), range(min(rows, columns)))
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left @ right, weight.float(), rtol=1e-4, atol=1e-5)


@quick
@given(sizes, sizes, seeds, st.data())
def test_squared_error_equals_the_dropped_squared_singular_values(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    weight = random_weight(rows, columns, seed)
    svd = factorize(weight)
    num_components = min(rows, columns)
    kept = sorted(data.draw(st.sets(st.integers(0, num_components - 1), min_size=1)))
    dropped = [k for k in range(num_components) if k not in kept]
    left, right = balanced_factors(svd, kept)
    error = (weight - left @ right).square().sum()
    torch.testing.assert_close(error, svd.s[dropped].square().sum(), rtol=1e-9, atol=1e-12)


@quick
@given(sizes, sizes, seeds)
def test_error_of_the_leading_components_falls_with_rank(
    rows: int, columns: int, seed: int
) -> None:
    weight = random_weight(rows, columns, seed)
    svd = factorize(weight)
    errors = []
    for rank in range(1, min(rows, columns) + 1):
        left, right = balanced_factors(svd, range(rank))
        errors.append(float((weight - left @ right).norm()))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))


@quick
@given(sizes, sizes, seeds)
def test_both_factors_carry_the_root_of_each_singular_value(
    rows: int, columns: int, seed: int
) -> None:
    svd = factorize(random_weight(rows, columns, seed))
    left, right = balanced_factors(svd, range(min(rows, columns)))
    torch.testing.assert_close(left.square().sum(dim=0), svd.s, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(right.square().sum(dim=1), svd.s, rtol=1e-10, atol=1e-12)


@quick
@given(sizes, sizes, seeds)
def test_decomposition_is_thin_orthonormal_and_descending(
    rows: int, columns: int, seed: int
) -> None:
    u, s, vh = factorize(random_weight(rows, columns, seed))
    num_components = min(rows, columns)
    eye = torch.eye(num_components, dtype=torch.float64)
    assert (u.shape, vh.shape) == ((rows, num_components), (num_components, columns))
    torch.testing.assert_close(u.mT @ u, eye)
    torch.testing.assert_close(vh @ vh.mT, eye)
    assert (s >= 0).all()
    assert (s[:-1] >= s[1:]).all()
