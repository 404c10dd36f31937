"""How far a merge of layers changes the final hidden states of a model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.linalg.layers import cosine_sum
from grasp_lightning.methods.base import Track, untracked
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.merging import merged_for_a_trial
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.plan import MergeLayers
from grasp_lightning.training.hidden_cache import HiddenCache

Batch = Mapping[str, Tensor]


@torch.no_grad()
def final_states(view: DecoderView, batches: Sequence[Batch]) -> Tensor:
    """Return the hidden states after the last decoder layer and the final norm.

    Args:
        batches: Batches of ``TokenWindows.batch``, each of one window; processes share them.

    Returns:
        ``(W, T, D)`` on the CPU, in the dtype of the model, the same in all processes.
    """
    own: dict[str, Tensor] = {}
    with frozen(view.model):
        for number, counts in _own_windows(view, len(batches)):
            states = _last_hidden(view, batches[number])
            if counts:
                own[str(number)] = states.cpu()
    return torch.cat(list(processes.merged(own, map(str, range(len(batches)))).values()))


class MergeTrials:
    """Tries merges, and compares the final hidden states with those of the dense model.

    Between two changes of the model, the inputs of its layers are cached, so that a trial runs only
    the layers above it.

    Args:
        batches: Batches of ``TokenWindows.batch``, each of one window.
        dense: The dense model's ``final_states`` on them, ``(W, T, D)``.
        track: Shows the progress of a trial.
    """

    def __init__(self, batches: Sequence[Batch], dense: Tensor, track: Track = untracked) -> None:
        self._batches = batches
        self._dense = dense
        self._track = track
        self._cache: tuple[tuple[int, ...], HiddenCache] | None = None

    @torch.no_grad()
    def __call__(self, view: DecoderView, operation: MergeLayers) -> float:
        """Return the mean cosine over all real tokens, in [-1, 1], the same in all processes.

        The merge is undone, and the model is unchanged to the bit.
        """
        own = _own_windows(view, len(self._batches))
        sums = self._own_sums(view, operation, own) if own else {}
        found = processes.merged(sums, map(str, range(len(self._batches)))).values()
        return sum(total for total, _ in found) / sum(count for _, count in found)

    def _own_sums(
        self, view: DecoderView, operation: MergeLayers, own: Sequence[tuple[int, bool]]
    ) -> dict[str, tuple[float, int]]:
        """Return the sum of cosines and the number of tokens of each own window that counts."""
        sums: dict[str, tuple[float, int]] = {}
        with frozen(view.model), ExitStack() as stack:
            cache = self._cache_of(view, own)
            windows = [number for number, counts in own if counts]
            # Processes that share a model must run the same layers.
            start = None if is_sharded(view.model) else cache.start_layer(operation.base, windows)
            stack.enter_context(merged_for_a_trial(view, operation))
            for index in operation.absorbed:
                stack.enter_context(cache.skipping(index))
            stack.enter_context(cache.starting_from(start))
            items = [str(number) for number, _ in own]
            tracked = self._track(items, f"try to merge into layer {operation.base}")
            for _, (number, counts) in zip(tracked, own, strict=True):
                cache.start_batch(torch.tensor([number] if counts else []))
                states = _last_hidden(view, self._batches[number])
                if counts:
                    sums[str(number)] = self._compared(number, states)
        return sums

    def _compared(self, number: int, states: Tensor) -> tuple[float, int]:
        """Return the sum of the cosines in a window, and its number of real tokens."""
        mask = self._batches[number]["mask"].to(states.device)
        dense = self._dense[number : number + 1].to(states.device)
        return float(cosine_sum(dense, states, mask)), int(mask.sum())

    def _cache_of(self, view: DecoderView, own: Sequence[tuple[int, bool]]) -> HiddenCache:
        """Return the layer inputs of the present model."""
        if self._cache is None or self._cache[0] != view.layer_indices:
            self._cache = None  # frees the earlier one
            cache = HiddenCache(view)
            with cache.capturing(view.layer_indices, sum(counts for _, counts in own)):
                for number, counts in own:
                    cache.start_batch(torch.tensor([number] if counts else []))
                    _last_hidden(view, self._batches[number])
            self._cache = view.layer_indices, cache
        return self._cache[1]


def _own_windows(view: DecoderView, number: int) -> list[tuple[int, bool]]:
    """Return the windows of this process, and whether each counts.

    The others only keep processes in step that share a model.
    """
    shares = processes.own_batches(range(number), 1)
    windows = [(window, counts) for (window,), counts in shares]
    return windows if is_sharded(view.model) else [entry for entry in windows if entry[1]]


def _last_hidden(view: DecoderView, batch: Batch) -> Tensor:
    given = {key: value.to(view.model.device) for key, value in batch.items()}
    states: Tensor = view.model.base_model(**forward_inputs(given), use_cache=False)[0]
    return states
