import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.layers import angular_distance_sum, cosine_sum
from tests.reference.definitions import block_influence

FUNCTIONS = [cosine_sum, angular_distance_sum, block_influence]
real = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_states_of_different_shapes_are_refused(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    message = (
        "hidden states must have one shape, got (2, 3, 4) entering the layer "
        "and (2, 3, 5) leaving it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(2, 3, 4), torch.ones(2, 3, 5), real)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mask_of_another_shape_is_refused(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    message = "mask must have one entry per token, (2, 3), got (3, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(2, 3, 4), torch.ones(2, 3, 4), real.T)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_integer_mask_is_refused(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    message = "mask must be bool, got torch.int64; convert it with mask.bool()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(torch.ones(2, 3, 4), torch.ones(2, 3, 4), real.long())


@pytest.mark.parametrize("function", [cosine_sum, angular_distance_sum])
def test_sums_over_no_token_are_zero(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert float(function(torch.ones(2, 3, 4), torch.ones(2, 3, 4), ~real)) == 0


def test_known_angles() -> None:
    hidden_in = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    hidden_out = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    assert float(cosine_sum(hidden_in, hidden_out, mask)) == 1.0
    assert float(angular_distance_sum(hidden_in, hidden_out, mask)) == 0.5
    assert float(block_influence(hidden_in, hidden_out, mask)) == 0.5
    assert float(block_influence(hidden_in, hidden_out, ~mask)) == 2.0


def test_state_of_zeros_counts_as_orthogonal() -> None:
    hidden, zeros = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert float(cosine_sum(hidden, zeros, real)) == 0
    assert float(angular_distance_sum(zeros, zeros, real)) == 3
    assert float(block_influence(zeros, hidden, real)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_float64_and_influence_is_float32(dtype: torch.dtype) -> None:
    hidden = torch.ones(2, 3, 4, dtype=dtype)
    dtypes = [function(hidden, hidden, real).dtype for function in FUNCTIONS]
    assert dtypes == [torch.float64, torch.float64, torch.float32]


def test_neighbouring_bfloat16_states_are_distinguished() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 512, generator=generator).bfloat16()
    turned = (hidden * (1 + 0.01 * torch.randn(2, 3, 512, generator=generator))).bfloat16()
    exact = torch.cosine_similarity(hidden.double(), turned.double(), dim=-1).sum()
    torch.testing.assert_close(cosine_sum(hidden, turned, real), exact, rtol=0, atol=1e-7)
    assert 0 < float(block_influence(hidden, turned, real)) < 1e-3


def test_large_float16_states_do_not_overflow() -> None:
    hidden = torch.full((2, 3, 64), 60000.0, dtype=torch.float16)
    assert float(cosine_sum(hidden, hidden, real)) == 6


def test_nan_of_a_real_token_is_not_hidden() -> None:
    hidden = torch.ones(2, 3, 4)
    hidden[0, 1, 2] = float("nan")
    for function in FUNCTIONS:
        assert function(torch.ones(2, 3, 4), hidden, real).isnan()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_carry_no_autograd_history(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert not function(hidden, hidden * 2, real).requires_grad
