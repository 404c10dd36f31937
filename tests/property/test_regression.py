import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.factors import SVD, balanced_factors
from grasp_lightning.linalg.regression import (
    output_error,
    pulled_regression,
    reduced_rank_regression,
)
from grasp_lightning.linalg.weightings import curvature_error, damped_root, weighted_svd

quick = settings(max_examples=40, deadline=None)
sizes = st.integers(2, 8)
seeds = st.integers(0, 2**31)
ridges = st.sampled_from([0.0, 1e-3, 0.3])


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``(M, T)`` of full rank, and outputs ``(N, T)`` that are partly theirs."""
    x = random(columns, 3 * columns + 4, seed=seed)
    noise = random(rows, x.shape[1], seed=seed + 1)
    return x, random(rows, columns, seed=seed + 2) @ x + noise


def product(svd: SVD) -> Tensor:
    return (svd.u * svd.s) @ svd.vh


def objective(weight: Tensor, x: Tensor, y: Tensor, prior: Tensor, ridge: float) -> float:
    rho = ridge * float((x @ x.mT).diagonal().mean())
    return float((y - weight @ x).square().sum() + rho * (weight - prior).square().sum())


@quick
@given(sizes, sizes, seeds)
def test_full_rank_equals_least_squares(rows: int, columns: int, seed: int) -> None:
    x, y = tokens(rows, columns, seed)
    svd = reduced_rank_regression(y @ x.mT, x @ x.mT, min(rows, columns))
    expected = torch.linalg.lstsq(x.mT, y.mT).solution.mT
    torch.testing.assert_close(product(svd), expected, rtol=1e-7, atol=1e-8)


@quick
@given(sizes, sizes, seeds, ridges, st.booleans())
def test_full_rank_with_a_ridge_solves_the_normal_equations(
    rows: int, columns: int, seed: int, ridge: float, has_left: bool
) -> None:
    x, y = tokens(rows, columns, seed)
    prior = random(rows, columns, seed=seed + 3)
    # At full rank the metric of the outputs has no influence.
    left = damped_root(random(rows, seed=seed + 4).abs().diag(), 0.1) if has_left else None
    gram = x @ x.mT
    svd = reduced_rank_regression(
        y @ x.mT, gram, min(rows, columns), prior=prior, ridge=ridge, left=left
    )
    rho = ridge * gram.diagonal().mean()
    damped = gram + rho * torch.eye(columns, dtype=torch.float64)
    expected = torch.linalg.solve(damped, (y @ x.mT + rho * prior).mT).mT
    torch.testing.assert_close(product(svd), expected, rtol=1e-7, atol=1e-8)


@quick
@given(sizes, sizes, seeds, ridges, st.data())
def test_no_weight_of_the_rank_is_better(
    rows: int, columns: int, seed: int, ridge: float, data: st.DataObject
) -> None:
    x, y = tokens(rows, columns, seed)
    prior = random(rows, columns, seed=seed + 3)
    rank = data.draw(st.integers(1, min(rows, columns)))
    svd = reduced_rank_regression(y @ x.mT, x @ x.mT, rank, prior=prior, ridge=ridge)
    best = objective(product(svd), x, y, prior, ridge)
    left, right = balanced_factors(svd, range(rank))
    scale = data.draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    moved = (left + scale * random(rows, rank, seed=seed + 4)) @ (
        right + scale * random(rank, columns, seed=seed + 5)
    )
    assert best <= objective(moved, x, y, prior, ridge) * (1 + 1e-9)
    alternated = alternating_least_squares(x, y, rank, prior=prior, ridge=ridge)
    assert best <= objective(alternated, x, y, prior, ridge) * (1 + 1e-9)


def alternating_least_squares(
    x: Tensor, y: Tensor, rank: int, *, prior: Tensor, ridge: float
) -> Tensor:
    """Weight of a rank after some rounds, the ridge as tokens of its own."""
    num_inputs = len(x)
    rho = ridge * float((x @ x.mT).diagonal().mean())
    x = torch.cat([x, rho**0.5 * torch.eye(num_inputs, dtype=x.dtype)], dim=1)
    y = torch.cat([y, rho**0.5 * prior], dim=1)
    target = torch.linalg.lstsq(x.mT, y.mT).solution.mT
    right = random(rank, num_inputs, seed=0)
    for _ in range(10):
        left = torch.linalg.lstsq((right @ x).mT, y.mT).solution.mT
        right = torch.linalg.lstsq(left, target).solution
    weight: Tensor = left @ right
    return weight


@quick
@given(sizes, sizes, seeds, st.data())
def test_the_metric_of_the_outputs_is_minimised(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    x, y = tokens(rows, columns, seed)
    root = damped_root(random(rows, seed=seed + 3).square().diag(), 0.01)
    rank = data.draw(st.integers(1, min(rows, columns)))
    weighted = product(reduced_rank_regression(y @ x.mT, x @ x.mT, rank, left=root))
    plain = product(reduced_rank_regression(y @ x.mT, x @ x.mT, rank))
    in_metric = [float((root.mT @ (y - w @ x)).square().sum()) for w in (weighted, plain)]
    unweighted = [float((y - w @ x).square().sum()) for w in (weighted, plain)]
    assert in_metric[0] <= in_metric[1] * (1 + 1e-9)
    assert unweighted[1] <= unweighted[0] * (1 + 1e-9)


@quick
@given(sizes, sizes, seeds, ridges, st.data())
def test_outputs_of_a_weight_give_its_weighted_truncation(
    rows: int, columns: int, seed: int, ridge: float, data: st.DataObject
) -> None:
    x, _ = tokens(rows, columns, seed)
    has_left = data.draw(st.booleans())
    weight, gram = random(rows, columns, seed=seed + 3), x @ x.mT
    left = damped_root(random(rows, seed=seed + 4).square().diag(), 0.1) if has_left else None
    rank = data.draw(st.integers(1, min(rows, columns)))
    fitted = reduced_rank_regression(
        weight @ gram, gram, rank, prior=weight, ridge=ridge, left=left
    )
    svd = weighted_svd(weight, left, damped_root(gram, ridge))
    torch.testing.assert_close(fitted.s, svd.s[:rank], rtol=1e-7, atol=1e-8)
    # Where neighbouring values are equal the truncation is not unique, but its error is.
    root = damped_root(gram, ridge)
    error = curvature_error(
        weight - product(fitted), None if left is None else left @ left.mT, root @ root.mT
    )
    expected = svd.s[rank:].square().sum()
    torch.testing.assert_close(error, expected, rtol=1e-7, atol=1e-8 * float(svd.s[0]) ** 2)


@quick
@given(sizes, sizes, seeds)
def test_output_error_equals_the_error_over_tokens(rows: int, columns: int, seed: int) -> None:
    x, y = tokens(rows, columns, seed)
    weight = random(rows, columns, seed=seed + 3)
    error = output_error(weight, y @ x.mT, x @ x.mT, float(y.square().sum()))
    torch.testing.assert_close(error, (y - weight @ x).square().sum(), rtol=1e-9, atol=1e-9)


@quick
@given(sizes, sizes, seeds, ridges, st.floats(0, 10))
def test_pulled_regression_is_the_solution_of_a_generic_solver(
    rows: int, columns: int, seed: int, ridge: float, pull: float
) -> None:
    x, y = tokens(rows, columns, seed)
    prior = random(rows, columns, seed=seed + 3)
    gram = x @ x.mT
    found = pulled_regression(y @ x.mT, gram, prior, pull=pull, ridge=ridge)
    rho = ridge * gram.diagonal().mean()
    identity = torch.eye(columns, dtype=torch.float64)
    inputs = torch.cat([x, math.sqrt(pull) * x, rho.sqrt() * identity], dim=1)
    outputs = torch.cat([y, math.sqrt(pull) * prior @ x, rho.sqrt() * prior], dim=1)
    # Its normal equations: few tokens may leave the solution itself open.
    normal = inputs @ inputs.mT
    scale = float((outputs @ inputs.mT).norm())
    torch.testing.assert_close(found @ normal, outputs @ inputs.mT, rtol=0, atol=1e-7 * scale)


@quick
@given(sizes, sizes, seeds, ridges, st.floats(0, 10))
def test_outputs_of_the_prior_give_the_prior(
    rows: int, columns: int, seed: int, ridge: float, pull: float
) -> None:
    x, _ = tokens(rows, columns, seed)
    prior = random(rows, columns, seed=seed + 3)
    gram = x @ x.mT
    found = pulled_regression(prior @ gram, gram, prior, pull=pull, ridge=ridge)
    torch.testing.assert_close(found, prior, rtol=1e-6, atol=1e-6)
