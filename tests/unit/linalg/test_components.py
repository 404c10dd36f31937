import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.components import TokenGradient, sigma_gradients, window_scores
from grasp_lightning.linalg.factors import SVD, factorize

# Any: keyword arguments of several types.
PAPER: dict[str, Any] = {"terms": "full", "score": "taylor", "squared": False}


def paper_scores(svd: SVD, weight_grad: Tensor) -> Tensor:
    return window_scores(svd, weight_grad, **PAPER)


def random_case(rows: int = 24, columns: int = 16) -> tuple[SVD, Tensor]:
    generator = torch.Generator().manual_seed(0)
    svd = factorize(torch.randn(rows, columns, generator=generator))
    return svd, torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("function", [sigma_gradients, paper_scores])
def test_gradient_of_another_shape_is_refused(function: Callable[..., object]) -> None:
    svd, weight_grad = random_case()
    message = "weight_grad must have the shape of the weight, (24, 16), got (16, 24)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(svd, weight_grad.T)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"terms": "all"}, "terms must be one of ('full', 'sigma'), got 'all'"),
        ({"score": "magnitude"}, "score must be one of ('taylor', 'gradient'), got 'magnitude'"),
    ],
)
def test_unknown_options_are_refused(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        window_scores(*random_case(), **{**PAPER, **option})


def test_scores_of_a_diagonal_weight_by_hand() -> None:
    svd = SVD(u=torch.eye(2), s=torch.tensor([3.0, 2.0]), vh=torch.eye(2))
    weight_grad = torch.tensor([[-1.0, 5.0], [7.0, 4.0]])
    # Only u_kk and v_kk are not zero, so each of the three terms is |s_k G_kk|.
    assert paper_scores(svd, weight_grad).tolist() == [9.0, 24.0]
    sigma: dict[str, Any] = {"terms": "sigma", "score": "taylor"}  # Any: as above
    assert window_scores(svd, weight_grad, **sigma, squared=False).tolist() == [3.0, 8.0]
    assert window_scores(svd, weight_grad, **sigma, squared=True).tolist() == [9.0, 64.0]
    # |G_kk| + s_k (moduli of column k and of row k of G).
    full = window_scores(svd, weight_grad, terms="full", score="gradient", squared=False)
    assert full.tolist() == [43.0, 44.0]


def test_tokens_of_another_shape_are_refused() -> None:
    svd, _ = random_case()
    tokens = TokenGradient(x=torch.zeros(5, 16), grad_output=torch.zeros(4, 24))
    message = (
        "x and grad_output must be (tokens, 16) and (tokens, 24), as the weight is (24, 16), got "
        "(5, 16) and (4, 24)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        window_scores(svd, tokens, **PAPER)


@pytest.mark.parametrize("num_tokens", [2, 200])  # through the tokens, through the gradient
@pytest.mark.parametrize("terms", ["full", "sigma"])
def test_tokens_are_projected_in_the_wider_dtype_under_autocast(
    num_tokens: int, terms: str
) -> None:
    svd, _ = random_case()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, 16, generator=generator).bfloat16()
    grad_output = torch.randn(num_tokens, 24, generator=generator).bfloat16()
    option: dict[str, Any] = {**PAPER, "terms": terms}  # Any: as above
    exact = window_scores(svd, grad_output.double().mT @ x.double(), **option)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = window_scores(svd, TokenGradient(x, grad_output), **option)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_computed_in_the_wider_dtype(dtype: torch.dtype) -> None:
    svd, weight_grad = random_case()
    low = weight_grad.to(dtype)
    scores = paper_scores(svd, low)
    exact = window_scores(SVD(*(t.double() for t in svd)), low.double(), **PAPER)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_round_the_scores() -> None:
    svd, weight_grad = random_case()
    expected = paper_scores(svd, weight_grad)
    gradients = sigma_gradients(svd, weight_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(paper_scores(svd, weight_grad), expected)
        assert torch.equal(sigma_gradients(svd, weight_grad), gradients)


def test_inputs_are_left_as_they_were() -> None:
    svd, weight_grad = random_case()
    before = [tensor.clone() for tensor in (*svd, weight_grad)]
    paper_scores(svd, weight_grad)
    sigma_gradients(svd, weight_grad)
    assert all(torch.equal(*pair) for pair in zip(before, (*svd, weight_grad), strict=True))


def test_scores_carry_no_autograd_history() -> None:
    svd, weight_grad = random_case()
    svd = SVD(*(tensor.requires_grad_() for tensor in svd))
    assert not paper_scores(svd, weight_grad.requires_grad_()).requires_grad


def test_low_precision_on_both_sides_still_gives_float32() -> None:
    svd, weight_grad = random_case()
    low = SVD(*(tensor.bfloat16() for tensor in svd))
    scores = paper_scores(low, weight_grad.bfloat16())
    expected = paper_scores(SVD(*(tensor.float() for tensor in low)), weight_grad.bfloat16())
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_nan_in_the_gradient_is_not_hidden() -> None:
    svd, weight_grad = random_case()
    weight_grad[3, 4] = float("nan")
    assert paper_scores(svd, weight_grad).isnan().all()


def test_moduli_of_windows_do_not_cancel_and_signed_sums_do() -> None:
    svd, weight_grad = random_case()
    windows = [weight_grad, -weight_grad]
    absolute = torch.stack([paper_scores(svd, window) for window in windows]).sum(dim=0)
    signed = paper_scores(svd, windows[0] + windows[1])
    torch.testing.assert_close(absolute, 2 * paper_scores(svd, weight_grad))
    assert torch.equal(signed, torch.zeros(16))
