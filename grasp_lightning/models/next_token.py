"""Next-token prediction: inputs of the model, and losses of its logits.

Legend: B windows of T tokens, V words in the vocabulary, n predicted tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

# Logits are processed in parts of this many numbers: 4 MB in float32.
_PART = 2**20


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch with its tokens on a device.

    Masks and numbers of windows stay on the CPU, which reads them: for those on a GPU, it would
    wait until the GPU has done all its work.
    """
    return {**batch, "input_ids": batch["input_ids"].to(device)}


def forward_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model inputs of a batch with ``input_ids`` and ``mask``, both ``(B, T)``.

    There is an attention mask only if something is padded: without one, attention takes its faster
    causal path.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if not batch["mask"].all():
        inputs["attention_mask"] = batch["mask"].long().to(batch["input_ids"].device)
    return inputs


def next_token_losses(logits: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every predicted token; labels are shifted here, and only here.

    To save memory, logits that require grad are overwritten by their gradient. ``backward`` works
    once, and torch refuses it if the model needs these logits for its own gradient.

    Args:
        logits: Scores of the next token, ``(B, T, V)``, any float dtype.
        input_ids: Token ids, ``(B, T)``.
        targets: True where a token is predicted from those before it, ``(B, T)``; the first column
            is never read.

    Returns:
        Float32 losses in nats, one per predicted token, ``(n,)``.
    """
    rows, labels = _predicted(input_ids, targets)
    return _row_losses(logits, rows, lambda part, place: _cross_entropy(part, labels[place]))


def fisher_losses(
    logits: Tensor, input_ids: Tensor, targets: Tensor, seeds: Sequence[int]
) -> Tensor:
    """Return the cross-entropy of every predicted token, with random gradients of Fisher's size.

    The gradient of each loss by its logits is ``s * r - p (s . r)``, with ``p`` the predicted
    probabilities, ``s`` their roots, and ``r`` random signs. Its mean is zero and its covariance is
    ``diag(p) - p p^T``, the Fisher information of the prediction. Labels drawn from the prediction
    would give the same covariance with more noise, and rounding could change them.

    Source: Dangel et al., "BackPACK", arXiv:1912.10985, appendix (the factor of the Fisher
    information); Kunstner et al., "Limitations of the empirical Fisher approximation",
    arXiv:1905.12558 (why labels of the text do not give it).

    Other arguments, result and side effects: see ``next_token_losses``.

    Args:
        seeds: Seed of the signs of each window, ``B``; its signs depend on nothing else.
    """
    rows, labels = _predicted(input_ids, targets)
    owners = (_predicting_rows(targets) // input_ids.shape[1]).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def part_loss(part: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        log_probs = log_softmax(part, dim=-1)
        losses = -log_probs[_at(labels[place])]
        probs = log_probs.exp_()
        # Row by row, on the CPU: signs depend neither on how rows are split nor on the device.
        draws = [
            torch.randint(2, part.shape[1:], generator=generators[owner], dtype=torch.int8)
            for owner in owners[place]
        ]
        signs = torch.stack(draws).to(probs) * 2 - 1 if draws else probs
        grad = signs.mul_(probs.sqrt())
        return losses, grad.sub_(probs * grad.sum(dim=-1, keepdim=True))

    return _row_losses(logits, rows, part_loss)


def distillation_losses(
    logits: Tensor,
    teacher_logits: Tensor,
    input_ids: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    mix: float,
) -> Tensor:
    """Return the divergence of every prediction from a teacher's, mixed with its cross-entropy.

    Per predicted token ``mix * t^2 * KL(teacher || student) + (1 - mix) * cross-entropy``, where
    the temperature t softens both distributions of the divergence. Other arguments, result and side
    effects: see ``next_token_losses``.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section
    2 (the factor t^2 keeps the size of gradients).

    Args:
        teacher_logits: The teacher's scores, ``(B, T, V)``; they get no gradient.
        temperature: Above 0.
        mix: Share of the teacher, in [0, 1].

    Raises:
        ValueError: If the two logits differ in shape.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must score the same tokens, got logits of shape "
            f"{tuple(logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    flat = teacher_logits.detach().flatten(end_dim=1)
    rows, _ = _predicted(input_ids, targets)

    def divergence(part: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        return _divergence(part, flat[rows[place]].float(), temperature)

    return _mixed_losses(logits, input_ids, targets, divergence, mix)


PREDICTION_KEYS = ("teacher_ids", "teacher_log_probs", "teacher_tail")
"""Names of the parts of ``TopPredictions`` in a batch or a file."""


_UINT16 = 2**16


def stored_id_type(vocabulary: int) -> torch.dtype:
    """Return the smallest type in which the ids of a vocabulary are stored."""
    return torch.uint16 if vocabulary <= _UINT16 else torch.int32


def stored_bytes(top_k: int, vocabulary: int) -> int:
    """Return the bytes of one prediction on disk: ids, bfloat16 logarithms, and a float32 tail."""
    return top_k * (stored_id_type(vocabulary).itemsize + 2) + 4


class TopPredictions(NamedTuple):
    """The likeliest tokens of a teacher's n predictions, and the probability of all others.

    Attributes:
        ids: Tokens, ``(n, k)`` int64.
        log_probs: Logarithms of their probabilities, ``(n, k)``, in any float dtype.
        tail: Probability of all other tokens together, ``(n,)``.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


@torch.no_grad()
def top_predictions(
    logits: Tensor, input_ids: Tensor, targets: Tensor, *, top_k: int, temperature: float
) -> TopPredictions:
    """Return what ``top_k_distillation_losses`` needs of a teacher's logits, in float32.

    Args:
        logits: The teacher's scores, ``(B, T, V)``, any float dtype.
        top_k: k, from 1 to V.
        temperature: Softmax temperature, above 0.
    """
    rows, _ = _predicted(input_ids, targets)
    flat, parts = logits.flatten(end_dim=1), []
    size = max(_PART // logits.shape[-1], 1)
    for start in range(0, max(len(rows), 1), size):
        scores = flat[rows[start : start + size]].float() / temperature
        log_probs = log_softmax(scores, dim=-1)
        top, ids = log_probs.topk(top_k)
        # Summed, not one minus the others: a small rest keeps its digits.
        tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1).exp()
        parts.append((ids, top, tail))
    return TopPredictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def top_k_distillation_losses(
    logits: Tensor,
    teacher: TopPredictions,
    input_ids: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    mix: float,
) -> Tensor:
    """Return ``distillation_losses`` from the teacher's likeliest tokens; all others are one class.

    The divergence is at most that from the full distribution, and grows with k; for k = V both are
    equal. Other arguments, result and side effects: see ``distillation_losses``.

    Args:
        teacher: Predictions at the same temperature, one per predicted token. Their probabilities
            are scaled to sum to one with the tail, which removes the bias of rounded logarithms.

    Raises:
        ValueError: If there are not as many predictions as predicted tokens.
    """
    num_predicted = len(_predicted(input_ids, targets)[0])
    if len(teacher.tail) != num_predicted:
        raise ValueError(
            f"expected a prediction of the teacher for each of {num_predicted} tokens, got "
            f"{len(teacher.tail)}"
        )

    def divergence(part: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        own = TopPredictions(*(values[place] for values in teacher))
        return _class_divergence(part, own, temperature)

    return _mixed_losses(logits, input_ids, targets, divergence, mix)


PartLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Float32 logits ``(p, V)`` of some predicted tokens, and their slice of all n tokens -> losses
``(p,)``, and their gradient by the logits ``(p, V)``."""


def _mixed_losses(
    logits: Tensor, input_ids: Tensor, targets: Tensor, divergence: PartLoss, mix: float
) -> Tensor:
    rows, labels = _predicted(input_ids, targets)

    def mixed(part: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        divergences, divergence_grad = divergence(part, place)
        if mix == 1:
            return divergences, divergence_grad
        losses, grad = _cross_entropy(part, labels[place])
        return torch.lerp(losses, divergences, mix), torch.lerp(grad, divergence_grad, mix)

    return _row_losses(logits, rows, mixed)


def _predicted(input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the flattened logits that predict a token, and these tokens, (n,) each."""
    rows = _predicting_rows(targets).to(input_ids.device)
    return rows, input_ids.flatten()[rows + 1]


def _predicting_rows(targets: Tensor) -> Tensor:
    """Return the rows of the flattened logits that predict a token, ``(n,)``."""
    predicted = torch.zeros_like(targets)
    predicted[:, :-1] = targets[:, 1:]
    return predicted.flatten().nonzero().squeeze(1)


def _at(labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(labels), device=labels.device), labels


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    at_label = _at(labels)
    log_probs = log_softmax(logits, dim=-1)
    losses = -log_probs[at_label]
    grad = log_probs.exp_()
    grad[at_label] -= 1
    return losses, grad


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs = log_softmax(logits / temperature, dim=-1)
    teacher_log_probs = log_softmax(teacher / temperature, dim=-1)
    teacher_probs = teacher_log_probs.exp()
    # A probability of zero times a logarithm of minus infinity is zero; NaN stays.
    terms = torch.where(teacher_probs == 0, 0.0, teacher_probs * (teacher_log_probs - log_probs))
    return temperature**2 * terms.sum(dim=-1), temperature * (log_probs.exp_() - teacher_probs)


def _class_divergence(
    logits: Tensor, teacher: TopPredictions, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``_divergence`` over k + 1 classes: each of the teacher's k tokens, and the rest."""
    ids, tail = teacher.ids, teacher.tail.float()
    probs = teacher.log_probs.float().softmax(dim=-1) * (1 - tail)[:, None]
    log_probs = log_softmax(logits / temperature, dim=-1)
    own = log_probs.gather(-1, ids)
    own_tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
    terms = torch.where(probs == 0, 0.0, probs * (probs.log() - own)).sum(dim=-1)
    terms += torch.where(tail == 0, 0.0, tail * (tail.log() - own_tail))
    # Of the rest, the teacher's probability is split like the student's own.
    share = (log_probs - own_tail[:, None]).exp_().mul_(tail[:, None])
    grad = log_probs.exp() - torch.where(tail[:, None] == 0, 0.0, share)
    grad.scatter_(-1, ids, own.exp() - probs)
    return temperature**2 * terms, temperature * grad


def _row_losses(logits: Tensor, rows: Tensor, part_loss: PartLoss) -> Tensor:
    losses: Tensor = _RowLosses.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        logits.flatten(end_dim=1), rows, part_loss
    )
    return losses


class _RowLosses(torch.autograd.Function):
    """The loss of some rows of the logits, computed a few rows at a time.

    The gradient overwrites the logits: for a window of 2048 tokens and a vocabulary of 128
    thousand, each copy would take a gigabyte.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, part_loss: PartLoss) -> Tensor:  # noqa: ANN401  torch's own type
        # detach shares memory and version counter, so autograd notices if it saved the logits.
        grad = logits.detach() if ctx.needs_input_grad[0] else None
        ctx.rows, ctx.grad = rows, grad
        losses = []
        size = max(_PART // logits.shape[1], 1)
        for start in range(0, max(len(rows), 1), size):
            place = slice(start, start + size)
            part_losses, part_grad = part_loss(logits[rows[place]].float(), place)
            losses.append(part_losses)
            if grad is not None:
                grad[rows[place]] = part_grad.to(grad.dtype)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401  torch's own type
        # Scaled in place, so it serves one backward pass.
        grad, ctx.grad = ctx.grad, None
        is_other = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
        is_other[ctx.rows] = False
        grad.masked_fill_(is_other[:, None], 0)  # a logit there may be infinite, and times 0 is NaN
        scale = grad.new_zeros(len(grad))
        scale[ctx.rows] = grad_losses.to(grad.dtype)
        return grad.mul_(scale[:, None]), None, None
