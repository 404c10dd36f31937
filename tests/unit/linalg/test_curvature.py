import re

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.curvature import gram_sum, square_sum, squared_gradient_sum


def test_sums_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    weights = torch.tensor([4.0, 0.25])
    assert gram_sum(x).tolist() == [[10, 2], [2, 4]]
    assert gram_sum(x, weights).tolist() == [[6.25, 8], [8, 16]]
    assert square_sum(x).tolist() == [10, 4]
    assert square_sum(x, weights).tolist() == [6.25, 16]
    assert squared_gradient_sum(x, torch.tensor([[1.0], [2.0]])).tolist() == [[37, 4]]


def test_no_token_sums_to_zero() -> None:
    x = torch.ones(0, 2)
    assert torch.equal(gram_sum(x, torch.ones(0)), torch.zeros(2, 2).double())
    assert torch.equal(square_sum(x), torch.zeros(2).double())


def test_dtypes() -> None:
    x = torch.ones(5, 2, dtype=torch.bfloat16, requires_grad=True)
    for result in (gram_sum(x), square_sum(x), squared_gradient_sum(x, x)):
        assert result.dtype == torch.float64
        assert not result.requires_grad
    assert gram_sum(x, dtype=torch.float32).dtype == torch.float32


def test_products_of_bfloat16_inputs_are_not_rounded_under_autocast() -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double().mT @ x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram, squares = gram_sum(x), squared_gradient_sum(x, x)
    assert float((gram - exact).norm() / exact.norm()) < 1e-6
    torch.testing.assert_close(squares, x.double().square().mT @ x.double().square())


def test_tiny_gradients_do_not_underflow() -> None:
    grad_output = torch.full((4, 2), 1e-25)
    assert (squared_gradient_sum(torch.ones(4, 3), grad_output) > 0).all()


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.ones(3), None, "x must have one row per token, (T, M), got shape (3,)"),
        (
            torch.ones(3, 2),
            torch.ones(2),
            "weights must have one entry per token, (3,), got (2,)",
        ),
        (torch.ones(2, 2), torch.tensor([1.0, -2.0]), "weights must not be negative, got -2.0"),
    ],
)
def test_malformed_tokens_are_refused(x: Tensor, weights: Tensor | None, message: str) -> None:
    for function in (gram_sum, square_sum):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(x, weights)


def test_gradients_of_other_tokens_are_refused() -> None:
    message = "x and grad_output must have one row per token, got (3, 2) and (4, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        squared_gradient_sum(torch.ones(3, 2), torch.ones(4, 2))
