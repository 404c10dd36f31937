import logging
import math
import re

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.factors import SVD, factorize
from grasp_lightning.linalg.weightings import (
    activation_scales,
    damped_cholesky,
    damped_root,
    even_norms,
    weighted_svd,
)
from tests.reference.definitions import curvature_error

eye = torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (
            torch.ones(2, 3),
            "gram must be a square matrix or a vector with at least one entry, got shape (2, 3)",
        ),
        (
            torch.ones(0, 0),
            "gram must be a square matrix or a vector with at least one entry, got shape (0, 0)",
        ),
        (torch.eye(2).long(), "gram must have a float dtype, got torch.int64"),
        (torch.tensor([[1.0, math.nan], [0, 1]]), "gram has 1 non-finite entries of 4"),
        (
            torch.tensor([[1.0, 0.5], [0.25, 1]]),
            (
                "gram must be symmetric; two mirrored entries differ by 0.25 where the largest "
                "entry is 1"
            ),
        ),
        (
            torch.tensor([[1.0, 2], [2, 1]]),
            (
                "gram must be positive semidefinite; it is indefinite even with 0.0001 added "
                "to its diagonal, whose mean is 1"
            ),
        ),
    ],
)
def test_matrix_that_is_not_a_gram_is_refused(gram: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        damped_root(gram, 1e-10)


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    message = f"damping must be finite and not negative, got {damping}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        damped_root(eye, damping)


def test_float32_sums_of_another_order_count_as_symmetric() -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    gram = x.mT @ x
    gram[0, 1] = torch.nextafter(gram[0, 1], torch.tensor(math.inf))
    assert damped_root(gram, 1e-3).dtype == torch.float64


def test_metric_of_zeros_counts_as_of_mean_one() -> None:
    assert torch.equal(damped_root(torch.zeros(3, 3), 0.25), 0.5 * eye)
    assert torch.equal(damped_root(torch.zeros(3), 0.25), 0.5 * torch.ones(3).double())


def test_damping_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        root, jitter = damped_cholesky(torch.ones(3, 3), 0)
    assert caplog.messages == ["damping 0 left a metric indefinite; it was raised to 1e-10"]
    assert jitter == 1e-10
    torch.testing.assert_close(root @ root.mT, torch.ones(3, 3).double() + 1e-10 * eye)


def test_gram_itself_is_not_damped() -> None:
    gram = eye.clone()
    damped_root(gram, 1.0)
    assert torch.equal(gram, eye)


def test_root_of_a_diagonal_by_hand() -> None:
    root, jitter = damped_cholesky(torch.tensor([6.0, 0.0]), 1.0)
    assert jitter == 3.0
    assert root.tolist() == [3.0, math.sqrt(3)]


def test_truncation_prefers_what_the_metric_weighs() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0]))
    svd = weighted_svd(weight, None, torch.tensor([1.0, 10.0]))
    assert svd.s.tolist() == pytest.approx([20, 3])
    kept = svd.s[0] * torch.outer(svd.u[:, 0], svd.vh[0])
    torch.testing.assert_close(kept, torch.diag(torch.tensor([0.0, 2.0])))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (torch.ones(2), "right must have shape (3, 3) or (3,), got (2,)"),
        (torch.eye(4), "right must have shape (3, 3) or (3,), got (4, 4)"),
        (torch.ones(3, 3), "right must be lower triangular, as damped_root returns it"),
        (
            torch.tensor([1.0, 0, 1]),
            "right has zeros on its diagonal, so it has no inverse; raise the damping",
        ),
        (torch.tensor([1.0, math.inf, 1]), "right has entries that are not finite"),
    ],
)
def test_tensor_that_is_not_a_root_is_refused(root: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        weighted_svd(torch.ones(2, 3), None, root)


def test_weight_is_refused_as_by_factorize() -> None:
    root = torch.ones(3)
    with pytest.raises(ValueError, match=r"weight must be a matrix .* got shape \(3,\)"):
        weighted_svd(torch.ones(3), root, None)
    with pytest.raises(ValueError, match="dequantise it first"):
        weighted_svd(torch.ones(3, 3, dtype=torch.int8), root, None)
    with pytest.raises(ValueError, match=r"weight has .* non-finite entries of 9"):
        weighted_svd(torch.full((3, 3), math.nan), root, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [torch.float32, torch.float64])
def test_components_are_float32_unless_the_weight_is_float64(
    dtype: torch.dtype, inner: torch.dtype
) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3).to(dtype))
    svd = weighted_svd(weight, torch.eye(4).double() + torch.eye(4), eye, dtype=inner)
    for tensor in svd:
        assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
    torch.testing.assert_close(
        (svd.u * svd.s) @ svd.vh, weight.detach().to(svd.s.dtype), rtol=1e-4, atol=1e-5
    )


def test_curvature_error_by_hand() -> None:
    change = torch.tensor([[1.0, 2.0]])
    c_gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    # [1 2] C [1 2]^T = 2 + 4 + 12, times the 1 x 1 output metric.
    assert float(curvature_error(change, None, c_gram)) == 18
    assert float(curvature_error(change, torch.tensor([[0.5]]), c_gram)) == 9
    assert float(curvature_error(change, torch.tensor([0.5]), torch.tensor([2.0, 3.0]))) == 7
    assert float(curvature_error(change, None, None)) == 5


def test_activation_scales_by_hand() -> None:
    scales = activation_scales(torch.tensor([4.0, 0.0]))
    assert scales.tolist() == pytest.approx([2 + 1e-6, 1e-6], rel=1e-12)
    assert activation_scales(torch.tensor([4.0]), alpha=1.0).tolist() == [4 + 1e-6]
    for bad in (torch.tensor([-1.0]), torch.tensor([math.nan]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"^mean_modulus must be a vector of finite numbers"):
            activation_scales(bad)


def test_even_norms_leave_vectors_of_zeros_alone() -> None:
    svd = factorize(torch.zeros(2, 2))
    zeros = SVD(torch.zeros(2, 2), svd.s, svd.vh)
    assert torch.equal(even_norms(zeros).u, zeros.u)
    assert torch.equal(even_norms(zeros).vh, zeros.vh)
