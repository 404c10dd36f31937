"""Next-token prediction: how a model is called on windows, and its loss.

Legend: B windows of T tokens, V words in the vocabulary, n predicted tokens.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

# Rows of logits are taken so many numbers at a time: 4 MB in float32.
_PART = 2**20


def forward_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the keyword arguments with which a model is called on a batch of windows.

    Args:
        batch: ``input_ids`` and ``mask``, both ``(B, T)``.

    Returns:
        The ids, and an attention mask only where something is padded: without one, attention takes
        its faster causal path.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if not batch["mask"].all():
        inputs["attention_mask"] = batch["mask"].long()
    return inputs


def next_token_losses(logits: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every predicted token; labels are shifted here, and only here.

    No tensor of the size of the logits is made: logits that require grad are overwritten by their
    gradient. (Torch refuses ``backward`` if a model needs them for its own.) ``backward`` works
    once.

    Args:
        logits: Scores of the next token, ``(B, T, V)``, any float dtype.
        input_ids: Token ids, ``(B, T)``.
        targets: True where a token is predicted from the ones before it, ``(B, T)``; the first
            column is never read.

    Returns:
        Float32 losses in nats, one per predicted token, ``(n,)``.
    """
    predicted = torch.zeros_like(targets)
    predicted[:, :-1] = targets[:, 1:]
    rows = predicted.flatten().nonzero().squeeze(1)  # (n,), in the flattened logits
    labels = input_ids.flatten()[rows + 1]
    losses: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        logits.flatten(end_dim=1), rows, labels
    )
    return losses


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of some rows of logits, a few rows at a time.

    The forward pass puts the gradient by the logits in their place: at a window of 2048 tokens and
    a vocabulary of 128 thousand, each copy of them would take a gigabyte.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:  # noqa: ANN401  torch's own type
        # Detached, it shares memory and version counter: whoever saved the logits will notice.
        grad = logits.detach() if ctx.needs_input_grad[0] else None
        ctx.rows, ctx.grad = rows, grad
        losses = []
        for row, label in _parts(logits.shape[1], rows, labels):
            at_label = (torch.arange(len(row), device=row.device), label)
            log_probs = log_softmax(logits[row].float(), dim=-1)
            losses.append(-log_probs[at_label])
            if grad is not None:
                rows_grad = log_probs.exp_()
                rows_grad[at_label] -= 1
                grad[row] = rows_grad.to(grad.dtype)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401  torch's own type
        # Scaled in place, so it serves one backward pass.
        grad, ctx.grad = ctx.grad, None
        is_predicted = torch.zeros(len(grad), dtype=torch.bool, device=grad.device)
        is_predicted[ctx.rows] = True
        grad[~is_predicted] = 0  # not by a product: a logit there may be infinite
        scale = grad.new_zeros(len(grad))
        scale[ctx.rows] = grad_losses.to(grad.dtype)
        return grad.mul_(scale[:, None]), None, None


def _parts(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(_PART // vocabulary, 1)
    for start in range(0, max(len(tensors[0]), 1), size):
        yield tuple(tensor[start : start + size] for tensor in tensors)
