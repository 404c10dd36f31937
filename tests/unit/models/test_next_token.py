import pytest
import torch
from torch import Tensor

from grasp_lightning.models import next_token
from grasp_lightning.models.next_token import next_token_losses
from tests.conftest import tiny_model


def random_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Three windows of 70 tokens, of which some do not count, and 40 words."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 70, 40, generator=generator).to(dtype)
    input_ids = torch.randint(0, 40, (3, 70), generator=generator)
    targets = torch.rand(3, 70, generator=generator) < 0.8
    return logits, input_ids, targets


def naive_losses(logits: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    losses = [
        -torch.log_softmax(logits[window, position - 1].float(), -1)[input_ids[window, position]]
        for window in range(len(input_ids))
        for position in range(1, input_ids.shape[1])
        if targets[window, position]
    ]
    return torch.stack(losses)


def test_labels_are_shifted_exactly_once() -> None:
    input_ids = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(0))
    logits = tiny_model()(input_ids).logits.detach()
    losses = next_token_losses(logits, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
    naive = [-torch.log_softmax(logits[0, t - 1], -1)[input_ids[0, t]].item() for t in range(1, 6)]
    assert losses.tolist() == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_equal_a_loop_over_tokens(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token, "_PART", 40 * 32)  # several parts, and a rest
    logits, input_ids, targets = random_case(dtype)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    losses = next_token_losses(ours, input_ids, targets)
    expected = naive_losses(theirs, input_ids, targets)
    weights = torch.rand(len(expected), generator=torch.Generator().manual_seed(1))
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_window_without_predicted_tokens_has_no_losses() -> None:
    logits, input_ids, targets = random_case()
    logits.requires_grad_()
    losses = next_token_losses(logits, input_ids, torch.zeros_like(targets))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert logits.grad is not None
    assert not logits.grad.any()
