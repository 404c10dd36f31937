"""Predictions and loss of a model without each decoder layer or block."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.evaluation.cut_losses import divergence
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.next_token import forward_inputs, next_token_losses, on_device
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.models.surgery import in_place_of_linears, replacements
from grasp_lightning.plan import RemoveBlock
from grasp_lightning.stats.base import Removable
from grasp_lightning.training.hidden_cache import HiddenCache


@torch.no_grad()
def removal_losses(
    view: DecoderView,
    removables: Sequence[Removable],
    batches: Sequence[Mapping[str, Tensor]],
    track: Callable[[Sequence[str], str], Iterable[str]],
) -> dict[str, float]:
    """Return how far each removal alone moves the predictions of the dense model.

    The distance is the same as in ``cut_losses``. Processes share the removals unless the model is
    sharded. Layer inputs are cached, so only the layers above a removal run again.

    Args:
        view: The dense model; each part is removed and restored.
        batches: Batches of ``TokenWindows.batch``, all of one size.

    Returns:
        Nats per predicted token by name, in the order of ``removables``; equal in all processes.
    """
    by_name = {part.name: part for part in removables}
    names = list(by_name) if is_sharded(view.model) else processes.own_share(list(by_name))
    sums = dict.fromkeys(names, 0.0)
    with frozen(view.model):
        for number, batch in enumerate(batches, start=1):
            removals = _Removals(view, {by_name[name].layer for name in names}, batch)
            dense = removals.whole_logits()
            for name in track(names, f"measure removals, {number} of {len(batches)}"):
                logits = removals.logits_without(by_name[name])
                # Rounding can make the divergence negative if a part does nothing.
                sums[name] += max(divergence(logits, dense, removals.batch), 0.0)
    means = {name: loss / len(batches) for name, loss in sums.items()}
    return processes.merged(means, by_name)


@torch.no_grad()
def summed_losses_without(
    view: DecoderView, removables: Sequence[Removable], batch: Mapping[str, Tensor]
) -> Tensor:
    """Return the loss of one batch without each part, summed over its predicted tokens.

    Layer inputs are cached for the batch, so only the layers above a removal run again.

    Args:
        view: The model, in eval mode and without cache; each part is removed and restored.
        batch: A ``TokenWindows.batch``.

    Returns:
        Float64 nats, one per removable, on the CPU.
    """
    removals = _Removals(view, {part.layer for part in removables}, batch)
    removals.whole_logits()
    sums: list[Tensor] = []
    for part in removables:
        logits = removals.logits_without(part)
        ids, targets = removals.batch["input_ids"], removals.batch["targets"]
        sums.append(next_token_losses(logits, ids, targets).double().sum())
    return torch.stack(sums).cpu()


class _Removals:
    """One batch and its cached layer inputs.

    Attributes:
        batch: The batch, with its tokens on the device of the model.
    """

    def __init__(
        self, view: DecoderView, layers: Iterable[int], batch: Mapping[str, Tensor]
    ) -> None:
        self.batch = on_device(batch, view.model.device)
        self._view = view
        self._layers = sorted(layers)
        self._windows = list(range(len(batch["input_ids"])))
        self._cache = HiddenCache(view)
        self._cache.start_batch(torch.tensor(self._windows))

    def whole_logits(self) -> Tensor:
        """Return the logits of the whole model, and fill the cache."""
        with self._cache.capturing(self._layers, len(self._windows)):
            return self._logits()

    def logits_without(self, part: Removable) -> Tensor:
        """Return the logits without one part; needs a filled cache."""
        start = self._cache.start_layer(part.layer, self._windows)
        with self._cache.starting_from(start), self._without(part):
            return self._logits()

    def _logits(self) -> Tensor:
        logits: Tensor = self._view.model(**forward_inputs(self.batch)).logits
        return logits

    @contextmanager
    def _without(self, part: Removable) -> Iterator[None]:
        if not part.is_block:
            with self._cache.skipping(part.layer):
                yield
            return
        removal = RemoveBlock(block=part.name, modules=part.linears)
        with in_place_of_linears(self._view, replacements(self._view, [removal], {})):
            yield
