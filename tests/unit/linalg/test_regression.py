import logging
import re

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.regression import (
    output_error,
    pulled_regression,
    reduced_rank_regression,
)

CROSS, GRAM = torch.ones(2, 3), torch.eye(3)


@pytest.mark.parametrize(
    ("cross", "gram"), [(torch.ones(3), GRAM), (CROSS, torch.eye(2)), (CROSS, torch.ones(3))]
)
def test_sums_that_do_not_fit_are_refused(cross: Tensor, gram: Tensor) -> None:
    message = (
        f"cross must be (outputs, inputs) and gram (inputs, inputs), got {tuple(cross.shape)} and "
        f"{tuple(gram.shape)}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reduced_rank_regression(cross, gram, 1)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pulled_regression(cross, gram, cross, pull=0.0, ridge=0.0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        output_error(cross, cross, gram, 1.0)


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"^rank must lie in \[1, 2\], got {rank}$"):
        reduced_rank_regression(CROSS, GRAM, rank)


def test_tensors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^prior must have the shape of cross, \(2, 3\), got"):
        reduced_rank_regression(CROSS, GRAM, 1, prior=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"^left must have shape \(2, 2\) or \(2,\), got \(3,\)"):
        reduced_rank_regression(CROSS, GRAM, 1, left=torch.ones(3))
    with pytest.raises(ValueError, match=r"^weight must have the shape of cross, \(2, 3\), got"):
        output_error(torch.ones(3, 2), CROSS, GRAM, 1.0)
    with pytest.raises(ValueError, match=r"^prior must have the shape of cross, \(2, 3\), got"):
        pulled_regression(CROSS, GRAM, torch.ones(3, 2), pull=0.0, ridge=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_are_float32_unless_the_sums_are_float64(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    svd = reduced_rank_regression(CROSS.to(dtype), GRAM.to(dtype), 1, prior=CROSS, ridge=0.1)
    left = pulled_regression(CROSS, GRAM, CROSS.to(dtype), pull=1.0, ridge=0.1)
    for tensor in (*svd, left):
        assert tensor.dtype == expected
        assert tensor.is_contiguous()
    assert [tuple(tensor.shape) for tensor in (*svd, left)] == [(2, 1), (1,), (1, 3), (2, 3)]
    assert output_error(CROSS.to(dtype), CROSS, GRAM, 6.0).dtype == torch.float64


def test_strong_ridge_returns_the_prior() -> None:
    prior = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
    u, s, vh = reduced_rank_regression(CROSS, GRAM, 2, prior=prior, ridge=1e9)
    torch.testing.assert_close((u * s) @ vh, prior, rtol=1e-5, atol=1e-5)


def test_fewer_tokens_than_inputs_are_fitted_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    y = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        u, s, vh = reduced_rank_regression(y @ x.mT, x @ x.mT, 1)
    assert len(caplog.messages) == 1
    torch.testing.assert_close((u * s) @ vh @ x, y, rtol=1e-6, atol=1e-6)


def test_output_error_by_hand() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 3.0]])
    error = output_error(torch.tensor([[2.0]]), y @ x.mT, x @ x.mT, float(y.square().sum()))
    assert float(error) == 1 + 1
