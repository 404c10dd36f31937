import pytest
import torch
from torch import Tensor

from grasp_lightning.models import next_token
from grasp_lightning.models.next_token import fisher_losses, next_token_losses
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


def random_gradients(case: tuple[Tensor, Tensor, Tensor], seeds: list[int]) -> Tensor:
    logits = case[0].clone().requires_grad_()
    fisher_losses(logits, *case[1:], seeds=seeds).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_random_gradients_have_the_covariance_of_the_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 2, 6, generator=generator)
    case = logits, torch.tensor([[0, 3]]), torch.ones(1, 2, dtype=torch.bool)
    draws = torch.stack([random_gradients(case, [seed])[0, 0] for seed in range(5000)])
    probs = logits[0, 0].softmax(-1)
    fisher = probs.diag() - probs[:, None] * probs
    torch.testing.assert_close(draws.mean(0), torch.zeros(6), rtol=0, atol=0.03)
    torch.testing.assert_close(draws.mT @ draws / len(draws), fisher, rtol=0, atol=0.015)
    # As of every cross-entropy: logits that rise together change nothing.
    torch.testing.assert_close(draws.sum(-1), torch.zeros(len(draws)), rtol=0, atol=1e-5)


def test_random_gradients_of_two_tokens_are_independent() -> None:
    # The same prediction twice.
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)).expand(1, 3, 6)
    case = logits, torch.tensor([[0, 3, 1]]), torch.ones(1, 3, dtype=torch.bool)
    draws = torch.stack([random_gradients(case, [seed])[0] for seed in range(5000)])
    across = draws[:, 0].mT @ draws[:, 1] / len(draws)
    torch.testing.assert_close(across, torch.zeros(6, 6), rtol=0, atol=0.015)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_with_random_gradients_are_the_cross_entropy(dtype: torch.dtype) -> None:
    case = random_case(dtype)
    losses = fisher_losses(*case, seeds=[0, 1, 2])
    assert torch.equal(losses, next_token_losses(*case))
    gradients = random_gradients(case, [0, 1, 2])
    assert gradients.dtype == dtype
    predicted = torch.zeros_like(case[2])
    predicted[:, :-1] = case[2][:, 1:]
    assert not gradients[~predicted].any()
    assert gradients[predicted].abs().sum(-1).gt(0).all()


def test_random_gradients_depend_on_the_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, input_ids, targets = case = random_case()
    together = random_gradients(case, [4, 5, 6])
    for i in range(3):
        window = logits[i : i + 1], input_ids[i : i + 1], targets[i : i + 1]
        assert torch.equal(together[i : i + 1], random_gradients(window, [4 + i]))
    assert not torch.equal(together, random_gradients(case, [7, 8, 9]))
    monkeypatch.setattr(next_token, "_PART", 40 * 32)
    assert torch.equal(together, random_gradients(case, [4, 5, 6]))


def test_random_gradients_without_a_predicted_token_are_zero() -> None:
    logits, input_ids, targets = random_case()
    case = logits, input_ids, torch.zeros_like(targets)
    assert not random_gradients(case, []).any()
