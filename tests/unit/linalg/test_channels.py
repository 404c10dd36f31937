import re

import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.channels import narrowed_weight, removal_order
from grasp_lightning.linalg.weightings import damped_root

WEIGHT = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])


def test_channels_without_correlation_go_by_their_share_of_the_output() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
    order, losses = removal_order(WEIGHT, gram, None, 0.0)
    assert order.tolist() == [0, 1, 2]
    torch.testing.assert_close(losses, torch.tensor([4.0, 5.0, 9.0], dtype=torch.float64))
    torch.testing.assert_close(narrowed_weight(WEIGHT, gram, [1, 2], 0.0), WEIGHT[:, 1:])


def test_metric_of_the_outputs_decides() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 1.0]))
    left = torch.tensor([2.0, 0.1])  # the second output hardly matters
    order, losses = removal_order(WEIGHT, gram, left, 0.0)
    assert order.tolist() == [2, 0, 1]
    torch.testing.assert_close(losses[0], torch.tensor(0.09, dtype=torch.float64))


def test_removing_a_copy_of_another_channel_costs_nothing_and_moves_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    inputs[2] = 2 * inputs[0]
    gram = inputs @ inputs.mT
    order, losses = removal_order(WEIGHT.double(), gram, None, 1e-9)
    assert int(order[0]) in (0, 2)
    assert float(losses[0]) < 1e-6 * float(losses[1])
    kept = narrowed_weight(WEIGHT.double(), gram, [0, 1], 1e-9)
    expected = torch.tensor([[1.0, 2.0], [6.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_result_is_float32_or_better(dtype: torch.dtype) -> None:
    narrowed = narrowed_weight(WEIGHT.to(dtype), torch.eye(3), [0, 2], 1e-2)
    assert narrowed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert narrowed.is_contiguous()


def test_channels_that_were_never_active_go_first() -> None:
    gram = torch.zeros(3, 3)
    assert removal_order(WEIGHT, gram, None, 1e-2).order.tolist() == [0, 1, 2]
    gram[1, 1] = 1.0
    assert removal_order(WEIGHT, gram, None, 1e-2).order.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("weight", "gram", "left", "message"),
    [
        (
            WEIGHT,
            torch.eye(2),
            None,
            (
                "weight must be (outputs, channels) and channel_gram (channels, channels), got "
                "(2, 3) and (2, 2)"
            ),
        ),
        (
            WEIGHT,
            torch.eye(3),
            damped_root(torch.eye(3), 0.0),
            "left must have shape (2, 2) or (2,), got (3, 3)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    weight: Tensor, gram: Tensor, left: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        removal_order(weight, gram, left, 0.0)


@pytest.mark.parametrize("kept", [[], [3], [-1, 0]])
def test_channels_that_are_not_there_are_refused(kept: list[int]) -> None:
    message = f"kept must name channels from 0 to 2, got {kept}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        narrowed_weight(WEIGHT, torch.eye(3), kept, 0.0)
