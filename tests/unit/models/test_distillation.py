import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from grasp_lightning.models import next_token
from grasp_lightning.models.next_token import (
    distillation_losses,
    next_token_losses,
    top_k_distillation_losses,
    top_predictions,
)

VOCABULARY = 40
RULED_OUT = -float("inf")


def random_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of student and teacher for three windows of 20 tokens, of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        3 * torch.randn(3, 20, VOCABULARY, generator=generator).to(dtype) for _ in range(2)
    )
    input_ids = torch.randint(0, VOCABULARY, (3, 20), generator=generator)
    targets = torch.rand(3, 20, generator=generator) < 0.7
    targets[2, 12:] = False  # padding
    return student, teacher, input_ids, targets


def predicting(targets: Tensor) -> Tensor:
    """True at the positions from which a token is predicted."""
    last = torch.zeros(len(targets), 1, dtype=torch.bool)
    return torch.cat([targets[:, 1:], last], dim=1)


def naive_losses(
    student: Tensor,
    teacher: Tensor,
    input_ids: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    mix: float,
) -> Tensor:
    rows = predicting(targets)
    own, given = student[rows].float(), teacher[rows].float()
    labels = input_ids[:, 1:][targets[:, 1:]]
    divergence = kl_div(
        log_softmax(own / temperature, dim=-1),
        softmax(given / temperature, dim=-1),
        reduction="none",
    ).sum(dim=-1)
    return mix * temperature**2 * divergence + (1 - mix) * cross_entropy(
        own, labels, reduction="none"
    )


def gradient(losses: Tensor, logits: Tensor) -> Tensor:
    """The gradient by the logits, with another weight for each of the losses."""
    weights = torch.rand(len(losses), generator=torch.Generator().manual_seed(1))
    (losses * weights).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows_per_part", [7, 1000])
def test_losses_and_gradients_equal_the_plain_formula(
    temperature: float, mix: float, rows_per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token, "_PART", VOCABULARY * rows_per_part)
    student, teacher, input_ids, targets = random_case()
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))

    losses = distillation_losses(
        ours, teacher, input_ids, targets, temperature=temperature, mix=mix
    )
    expected = naive_losses(theirs, teacher, input_ids, targets, temperature=temperature, mix=mix)

    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient(losses, ours), gradient(expected, theirs), rtol=1e-5, atol=1e-6
    )


def test_logits_in_low_precision_get_a_gradient_in_their_own_precision() -> None:
    student, teacher, input_ids, targets = random_case(torch.bfloat16)
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    losses = distillation_losses(ours, teacher, input_ids, targets, temperature=2.0, mix=0.5)
    expected = naive_losses(theirs, teacher, input_ids, targets, temperature=2.0, mix=0.5)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    grad = gradient(losses, ours)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, gradient(expected, theirs), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_teacher_with_the_same_logits_leaves_nothing_to_learn(temperature: float) -> None:
    student, _, input_ids, targets = random_case()
    teacher = student.clone()
    student.requires_grad_()
    losses = distillation_losses(
        student, teacher, input_ids, targets, temperature=temperature, mix=1.0
    )
    assert losses.tolist() == [0.0] * int(targets[:, 1:].sum())
    assert not gradient(losses, student).any()


def test_a_share_of_zero_is_the_plain_cross_entropy() -> None:
    student, teacher, input_ids, targets = random_case()
    losses = distillation_losses(student, teacher, input_ids, targets, temperature=2.0, mix=0.0)
    assert torch.equal(losses, next_token_losses(student, input_ids, targets))


def test_divergence_is_from_the_teacher_to_the_student() -> None:
    """A single word that the teacher is sure of, and to which the student gives a quarter."""
    student = torch.zeros(1, 2, 4)
    teacher = torch.zeros(1, 2, 4)
    teacher[0, 0, 1] = 100.0
    ids, targets = torch.tensor([[0, 2]]), torch.tensor([[False, True]])
    losses = distillation_losses(student, teacher, ids, targets, temperature=1.0, mix=1.0)
    assert losses.tolist() == pytest.approx([torch.tensor(4.0).log().item()])


@pytest.mark.parametrize("mix", [0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_that_predict_nothing_get_no_gradient_whatever_their_logits(
    mix: float, value: float
) -> None:
    student, teacher, input_ids, targets = random_case()
    rows = predicting(targets)
    student[~rows], teacher[~rows] = value, value
    ours = student.clone().requires_grad_()
    losses = distillation_losses(ours, teacher, input_ids, targets, temperature=2.0, mix=mix)
    grad = gradient(losses, ours)
    assert losses.isfinite().all()
    assert torch.equal(grad[~rows], torch.zeros_like(grad[~rows]))
    assert grad[rows].abs().sum(dim=-1).min() > 0


def test_neither_teacher_nor_logits_without_gradient_are_overwritten() -> None:
    student, teacher, input_ids, targets = random_case()
    before = student.clone(), teacher.clone()
    teacher.requires_grad_()
    distillation_losses(student, teacher, input_ids, targets, temperature=2.0, mix=0.5)
    ours = student.clone().requires_grad_()
    losses = distillation_losses(ours, teacher, input_ids, targets, temperature=2.0, mix=0.5)
    gradient(losses, ours)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert teacher.grad is None


def test_a_teacher_may_come_from_inference_mode() -> None:
    student, teacher, input_ids, targets = random_case()
    expected = distillation_losses(student, teacher, input_ids, targets, temperature=1.0, mix=0.5)
    with torch.inference_mode():
        given = teacher * 1.0
    ours = student.clone().requires_grad_()
    losses = distillation_losses(ours, given, input_ids, targets, temperature=1.0, mix=0.5)
    assert torch.equal(losses, expected)
    assert gradient(losses, ours).any()


@pytest.mark.parametrize("mix", [0.5, 1.0])
def test_a_word_that_the_teacher_rules_out_counts_nothing(mix: float) -> None:
    student, teacher, input_ids, targets = random_case()
    teacher[..., 5:9] = RULED_OUT
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    losses = distillation_losses(ours, teacher, input_ids, targets, temperature=2.0, mix=mix)
    expected = naive_losses(theirs, teacher, input_ids, targets, temperature=2.0, mix=mix)
    assert losses.isfinite().all()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient(losses, ours), gradient(expected, theirs), rtol=1e-5, atol=1e-6
    )


def test_a_word_that_both_rule_out_counts_nothing() -> None:
    student, teacher, input_ids, targets = random_case()
    student[..., -4:], teacher[..., -4:] = RULED_OUT, RULED_OUT
    input_ids.clamp_(max=VOCABULARY - 5)
    ours = student.clone().requires_grad_()
    losses = distillation_losses(ours, teacher, input_ids, targets, temperature=2.0, mix=0.5)
    fewer = distillation_losses(
        student[..., :-4], teacher[..., :-4], input_ids, targets, temperature=2.0, mix=0.5
    )
    torch.testing.assert_close(losses, fewer)
    grad = gradient(losses, ours)
    assert grad.isfinite().all()
    assert not grad[..., -4:].any()


@pytest.mark.parametrize("mix", [0.5, 1.0])
def test_a_student_that_is_nan_has_a_loss_that_is_nan(mix: float) -> None:
    student, teacher, input_ids, targets = random_case()
    targets[0, 3] = True
    student[0, 2, 7] = float("nan")
    number = int(targets[0, 1:3].sum())  # of the losses before it
    losses = distillation_losses(student, teacher, input_ids, targets, temperature=2.0, mix=mix)
    assert losses.isnan().nonzero().flatten().tolist() == [number]


def test_a_teacher_that_is_nan_has_a_loss_that_is_nan() -> None:
    student, teacher, input_ids, targets = random_case()
    teacher[..., 7] = float("nan")
    losses = distillation_losses(student, teacher, input_ids, targets, temperature=2.0, mix=1.0)
    assert losses.isnan().all()


def test_a_batch_without_predicted_tokens_has_no_losses() -> None:
    student, teacher, input_ids, targets = random_case()
    student.requires_grad_()
    nothing = torch.zeros_like(targets)
    losses = distillation_losses(student, teacher, input_ids, nothing, temperature=1.0, mix=0.5)
    assert losses.shape == (0,)
    assert not gradient(losses, student).any()


def test_a_teacher_with_another_vocabulary_is_a_mistake() -> None:
    student, teacher, input_ids, targets = random_case()
    message = (
        r"student and teacher must score the same tokens, got logits of shape \(3, 20, 40\) and "
        r"\(3, 20, 39\)"
    )
    with pytest.raises(ValueError, match=message):
        distillation_losses(student, teacher[..., 1:], input_ids, targets, temperature=1.0, mix=0.5)


# The teacher's likeliest tokens alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_all_tokens_of_the_teacher_give_the_full_divergence(
    temperature: float, mix: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token, "_PART", VOCABULARY * 7)
    student, teacher, input_ids, targets = random_case()
    teacher[..., 3] = RULED_OUT
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    top = top_predictions(teacher, input_ids, targets, top_k=VOCABULARY, temperature=temperature)
    losses = top_k_distillation_losses(
        ours, top, input_ids, targets, temperature=temperature, mix=mix
    )
    expected = distillation_losses(
        theirs, teacher, input_ids, targets, temperature=temperature, mix=mix
    )
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6 * max(temperature, 1) ** 2)
    torch.testing.assert_close(
        gradient(losses, ours), gradient(expected, theirs), rtol=1e-5, atol=1e-6
    )


def test_tokens_that_are_not_kept_are_one_class() -> None:
    student, teacher, input_ids, targets = random_case()
    ours, theirs = (student.double().float().requires_grad_() for _ in range(2))
    top = top_predictions(teacher, input_ids, targets, top_k=5, temperature=2.0)
    losses = top_k_distillation_losses(ours, top, input_ids, targets, temperature=2.0, mix=1.0)

    own, given = (part[predicting(targets)].double() / 2 for part in (theirs, teacher))
    is_kept = torch.zeros_like(given, dtype=torch.bool).scatter(-1, given.topk(5).indices, True)

    def classes(scores: Tensor) -> Tensor:
        probs = scores.softmax(-1)
        rest = probs.masked_fill(is_kept, 0).sum(-1, keepdim=True)
        return torch.cat([probs[is_kept].view(len(probs), 5), rest], dim=-1).log()

    expected = 4 * kl_div(classes(own), classes(given), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient(losses, ours), gradient(expected, theirs), rtol=1e-4, atol=1e-6
    )


def test_more_tokens_lose_less_even_if_their_logarithms_are_rounded() -> None:
    student, teacher, input_ids, targets = random_case()
    options = {"temperature": 1.0, "mix": 1.0}
    full = distillation_losses(student, teacher, input_ids, targets, **options).mean()
    lost = []
    for top_k in (1, 4, 16, VOCABULARY):
        top = top_predictions(teacher, input_ids, targets, top_k=top_k, temperature=1.0)
        kept = top._replace(log_probs=top.log_probs.bfloat16())
        losses = top_k_distillation_losses(student, kept, input_ids, targets, **options)
        lost.append(float((full - losses.mean()) / full))
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0.1
    assert abs(lost[-1]) < 1e-3


def test_predictions_for_other_tokens_are_refused() -> None:
    student, teacher, input_ids, targets = random_case()
    top = top_predictions(teacher[:2], input_ids[:2], targets[:2], top_k=3, temperature=1.0)
    with pytest.raises(ValueError, match="a prediction of the teacher for each of"):
        top_k_distillation_losses(student, top, input_ids, targets, temperature=1.0, mix=1.0)
