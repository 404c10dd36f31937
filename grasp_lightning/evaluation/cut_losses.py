"""How much each cut of a compression changes the predictions on its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.next_token import distillation_losses, forward_inputs, on_device
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.models.surgery import in_place_of_linears, replacements
from grasp_lightning.plan import FactorizeRows, Replacement

MAX_TOKENS = 512
"""Tokens of each window, so that two sets of logits fit into memory."""


@torch.no_grad()
def cut_losses(
    view: DecoderView,
    cuts: Sequence[Replacement | FactorizeRows],
    tensors: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    track: Callable[[Sequence[str], str], Iterable[str]],
) -> dict[str, float]:
    """Return how far each cut alone moves the predictions of the dense model.

    The distance is the mean Kullback-Leibler divergence from the dense predictions, in nats per
    predicted token. Its leading term is half the curvature of the loss with labels drawn from the
    model. Processes share the cuts unless the model is sharded.

    Args:
        view: The dense model; each cut is applied and undone.
        cuts: Cuts of linears, and of single groups of rows.
        tensors: Their tensors, see ``apply_operations``.
        batch: A ``TokenWindows.batch``.

    Returns:
        Divergence by name of the solved linear or group of rows, in the order of the cuts; equal in
        all processes.
    """
    given = on_device(batch, view.model.device)
    by_name = {cut.solved: cut for cut in cuts}
    names = list(by_name) if is_sharded(view.model) else processes.own_share(list(by_name))
    own: dict[str, float] = {}
    with frozen(view.model):
        dense = view.model(**forward_inputs(given)).logits
        for name in track(names, "measure each cut"):
            with in_place_of_linears(view, replacements(view, [by_name[name]], tensors)):
                logits = view.model(**forward_inputs(given)).logits
            own[name] = divergence(logits, dense, given)
    return processes.merged(own, by_name)


def divergence(logits: Tensor, dense: Tensor, batch: Mapping[str, Tensor]) -> float:
    """Return the mean KL divergence from dense predictions, in nats per predicted token.

    Args:
        logits: Of the other model, ``(B, T, V)``.
        dense: Of the dense model, ``(B, T, V)``.
        batch: Their ``TokenWindows.batch``, with the tokens on the same device.
    """
    ids, targets = batch["input_ids"], batch["targets"]
    losses = distillation_losses(logits, dense, ids, targets, temperature=1.0, mix=1.0)
    return float(losses.double().mean())


def first_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Truncate a batch to 512 tokens per window, so that two sets of logits fit into memory."""
    return {k: value[:, :MAX_TOKENS] if value.dim() > 1 else value for k, value in batch.items()}
