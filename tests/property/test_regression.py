"""Regression against a generic solver: normal equations, and cases that keep the prior."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.factors import balanced_factors
from grasp_lightning.linalg.regression import pulled_regression
from grasp_lightning.linalg.weightings import damped_root, weighted_svd

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


@quick
@given(sizes, sizes, seeds, st.data())
def test_left_factor_of_a_truncation_by_inputs_is_its_own_regression(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    x, _ = tokens(rows, columns, seed)
    weight = random(rows, columns, seed=seed + 3)
    rank = data.draw(st.integers(1, min(rows, columns)))
    root = damped_root(x @ x.mT, 1e-9)
    left, right = balanced_factors(weighted_svd(weight, None, root), range(rank))
    inner = right @ x
    found = pulled_regression(weight @ x @ inner.mT, inner @ inner.mT, left, pull=0.0, ridge=1e-9)
    scale = float((weight @ x).norm())
    torch.testing.assert_close(found @ inner, left @ inner, rtol=0, atol=1e-4 * scale)
