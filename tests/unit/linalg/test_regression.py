import logging
import re

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.regression import pulled_regression

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
        pulled_regression(cross, gram, cross, pull=0.0, ridge=0.0)


def test_prior_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^prior must have the shape of cross, \(2, 3\), got"):
        pulled_regression(CROSS, GRAM, torch.ones(3, 2), pull=0.0, ridge=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_result_is_float32_unless_the_prior_is_float64(dtype: torch.dtype) -> None:
    found = pulled_regression(CROSS, GRAM, CROSS.to(dtype), pull=1.0, ridge=0.1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.is_contiguous()
    assert tuple(found.shape) == (2, 3)


def test_by_hand() -> None:
    # Inputs of mean square 1, so that cross is the least-squares solution.
    prior = torch.zeros(2, 3)
    torch.testing.assert_close(pulled_regression(CROSS, GRAM, prior, pull=0.0, ridge=0.0), CROSS)
    half = pulled_regression(CROSS, GRAM, prior, pull=1.0, ridge=0.0)
    torch.testing.assert_close(half, CROSS / 2)
    third = pulled_regression(CROSS, GRAM, prior, pull=1.0, ridge=1.0)
    torch.testing.assert_close(third, CROSS / 3)


def test_fewer_tokens_than_inputs_are_fitted_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    y = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
    prior = torch.zeros(2, 3, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        found = pulled_regression(y @ x.mT, x @ x.mT, prior, pull=0.0, ridge=0.0)
    assert len(caplog.messages) == 1
    torch.testing.assert_close(found @ x, y, rtol=1e-6, atol=1e-6)
