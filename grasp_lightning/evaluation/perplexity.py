"""Perplexity on held-out windows, token-weighted."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from grasp_lightning.errors import NumericsError
from grasp_lightning.models.calls import find_non_finite
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.models.next_token import forward_inputs, next_token_losses, on_device


class Perplexity(Metric):
    """exp of the mean next-token loss over all predicted tokens, exact across processes.

    Every token has the same weight, whatever its window or batch.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    loss_sum: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Add losses in nats per predicted token, ``(n,)``."""
        self.loss_sum += losses.double().sum()
        self.num_tokens += losses.numel()

    def compute(self) -> Tensor:
        """Return the perplexity so far, a float64 scalar; NaN without tokens."""
        return torch.exp(self.loss_sum / self.num_tokens)


def evaluate_perplexity(view: DecoderView, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the perplexity of a model on held-out windows.

    Under ``torch.distributed`` each process passes its own windows, and all get the perplexity of
    all windows. Processes that share a sharded model must pass equally many batches.

    Args:
        batches: ``input_ids``, ``mask`` and ``targets``, each ``(B, T)``.
    """
    with frozen(view.model):
        return perplexity_of(view, _predictions(view, batches))


@torch.no_grad()
def _predictions(
    view: DecoderView, batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for batch in batches:
        moved = on_device(batch, view.model.device)
        yield moved, view.model(**forward_inputs(moved), use_cache=False).logits


@torch.no_grad()
def perplexity_of(
    view: DecoderView, predictions: Iterable[tuple[Mapping[str, Tensor], Tensor]]
) -> float:
    """Return the perplexity of some predictions, as ``evaluate_perplexity``.

    Args:
        view: The model that made them, frozen.
        predictions: Batches on its device, and their logits, ``(B, T, V)``.

    Raises:
        NumericsError: If a loss is NaN or infinite, or the perplexity is too large for float64.
    """
    metric = Perplexity().to(view.model.device)  # where the process group can reduce it
    for batch, logits in predictions:
        losses = next_token_losses(logits, batch["input_ids"], batch["targets"])
        where = find_non_finite(view, forward_inputs(batch), losses)
        if where is not None:
            raise NumericsError(
                f"the loss on the evaluation text is NaN or infinite, first in {where}; "
                f"{nan_advice(view.model.dtype)}"
            )
        metric.update(losses)
    value = float(metric.compute())
    if not math.isfinite(value):
        raise NumericsError(f"the perplexity on the evaluation text is {value}, beyond float64")
    return value
