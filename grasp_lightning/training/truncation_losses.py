"""Loss of a model in which a single linear is truncated, for many linears and ranks."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.factors import SVD, balanced_factors
from grasp_lightning.methods.base import Track
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.models.mixtures import weights_of
from grasp_lightning.models.next_token import forward_inputs, next_token_losses, on_device
from grasp_lightning.models.sharding import is_sharded, whole
from grasp_lightning.models.surgery import in_place_of_linears, replacements
from grasp_lightning.plan import FactorizeLinear
from grasp_lightning.stats.base import Sensitivity
from grasp_lightning.training.hidden_cache import HiddenCache
from grasp_lightning.training.refit import LayerStore

Batch = Mapping[str, Tensor]
Losses = dict[str, dict[int, float]]
_SECONDS = "seconds"


def num_sweeps(search: Sensitivity | None) -> int:
    """Return how often a search goes through all linears.

    With a time limit it first tries one rank of each, so that all are measured.
    """
    if search is None:
        return 0
    return 1 if search.seconds is None else 2


@torch.no_grad()
def truncation_losses(
    view: DecoderView,
    search: Sensitivity,
    basis: Callable[[str, Tensor], SVD],
    batches: Sequence[Batch],
    track: Track,
    *,
    store: LayerStore | None = None,
    caches: bool = True,
) -> Losses:
    """Return the loss with each linear truncated to each rank, the others dense.

    Processes share the linears, unless the model is sharded. Layer inputs are cached, so only the
    layers from a truncation on run again. Every loss is stored as soon as it is measured, and no
    loss depends on the number of processes or on the order. One that is NaN or infinite is a
    ``NumericsError``.

    Args:
        view: The dense model; every truncation is undone.
        search: The linears and ranks, and the time limit over all starts.
        basis: Components of a whole weight by name of the linear, the first to be kept.
        batches: Batches of ``TokenWindows.batch``, each of one window.
        track: Shows the progress of each sweep.
        store: Keeps the losses, as tensors of one number, for a later start.
        caches: Cache layer inputs; not for models whose layers pass each other more than hidden
            states.

    Returns:
        Nats per predicted token by linear and rank, in the order of ``search``; equal in all
        processes.
    """
    trials = _Trials(view, basis, batches, store)
    first = {name: ranks[:1] for name, ranks in search.ranks.items()}
    with frozen(view.model), trials.cached(enabled=caches):
        if search.seconds is None:
            trials.sweep(search.ranks, track, "try truncations", math.inf)
        else:
            trials.sweep(first, track, "try one truncation of each linear", math.inf)
            trials.sweep(search.ranks, track, "try truncations", search.seconds)
    found = trials.found
    return {n: {k: found[n][k] for k in search.ranks[n] if k in found[n]} for n in search.ranks}


class _Trials:
    """The measured losses, and the inputs of all layers of the dense model.

    Attributes:
        found: Loss by linear and rank, the same in all processes.
    """

    def __init__(
        self,
        view: DecoderView,
        basis: Callable[[str, Tensor], SVD],
        batches: Sequence[Batch],
        store: LayerStore | None,
    ) -> None:
        self._view = view
        self._basis = basis
        self._batches = [on_device(batch, view.model.device) for batch in batches]
        self._store = store
        self._cache = HiddenCache(view)
        stored = None if store is None else store.load(0)
        before, found = _unpacked(stored or {})
        self.found: Losses = defaultdict(dict, found)
        self._start = time.monotonic() - before

    @contextmanager
    def cached(self, *, enabled: bool) -> Iterator[None]:
        """Cache the inputs of all layers during a ``with`` block."""
        if enabled:
            with self._cache.capturing(self._view.layer_indices, len(self._batches)):
                self._loss()
        yield

    def sweep(
        self, trials: Mapping[str, Sequence[int]], track: Track, description: str, limit: float
    ) -> None:
        """Measure what is missing, linear by linear, until a number of seconds is over."""
        names = list(trials)
        size = 1 if is_sharded(self._view.model) else processes.num_processes()
        groups = [names[start : start + size] for start in range(0, len(names), size)]
        for turn, _ in enumerate(track([group[0] for group in groups], description)):
            ranks = {n: [k for k in trials[n] if k not in self.found[n]] for n in groups[turn]}
            if any(ranks.values()) and not self._measure(ranks, limit):
                return

    def _measure(self, trials: Mapping[str, Sequence[int]], limit: float) -> bool:
        """Measure one linear in each process; return whether there is time left."""
        names = list(trials)
        position = 0 if is_sharded(self._view.model) else processes.rank()
        own = names[position] if position < len(names) else None
        basis: SVD | None = None
        for turn in range(max(map(len, trials.values()))):
            if limit < math.inf and processes.on_first(self._seconds) >= limit:
                return False
            measured: dict[str, tuple[int, float]] = {}
            if own is not None and turn < len(trials[own]):
                basis = basis or self._decomposed(own)
                rank = trials[own][turn]
                measured[own] = rank, self._loss(own, rank, basis)
            for part in processes.gather(measured):
                for name, (rank, loss) in part.items():
                    self._check(name, rank, loss)
                    self.found[name][rank] = loss
            if self._store is not None:
                self._store.save(0, _packed(self.found, self._seconds()))
        return True

    def _decomposed(self, name: str) -> SVD:
        return self._basis(name, whole(weights_of(self._view, [name])[name]))

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _loss(self, name: str = "", rank: int = 0, basis: SVD | None = None) -> float:
        """Return the mean loss of all windows, with one linear truncated or with none."""
        windows = list(range(len(self._batches)))
        operations: list[FactorizeLinear] = []
        tensors: dict[str, Tensor] = {}
        start: int | None = None
        if basis is not None:
            left, right = balanced_factors(basis, range(rank))
            tensors = {f"{name}.left": left, f"{name}.right": right}
            operations = [FactorizeLinear(module=name, rank=rank, components=None)]
            start = self._cache.start_layer(self._view.layer_of(name) or 0, windows)
        total, number = torch.zeros((), dtype=torch.float64, device=self._view.model.device), 0
        new = replacements(self._view, operations, tensors)
        with in_place_of_linears(self._view, new), self._cache.starting_from(start):
            for window, batch in enumerate(self._batches):
                self._cache.start_batch(torch.tensor([window]))
                logits = self._view.model(**forward_inputs(batch)).logits
                losses = next_token_losses(logits, batch["input_ids"], batch["targets"])
                total += losses.double().sum()
                number += len(losses)
        return float(total) / number

    def _check(self, name: str, rank: int, loss: float) -> None:
        if not math.isfinite(loss):
            advice = nan_advice(self._view.model.dtype)
            raise NumericsError(
                f"the calibration loss with {name} truncated to rank {rank} is {loss}; {advice}"
            )


def _packed(losses: Losses, seconds: float) -> dict[str, Tensor]:
    """Return the losses as tensors ``(number, 2)`` of ranks and losses, by linear."""
    rows = {name: list(by_rank.items()) for name, by_rank in losses.items() if by_rank}
    found = {name: torch.tensor(pairs, dtype=torch.float64) for name, pairs in rows.items()}
    return {_SECONDS: torch.tensor([seconds], dtype=torch.float64), **found}


def _unpacked(stored: Mapping[str, Tensor]) -> tuple[float, Losses]:
    losses = {name: value.tolist() for name, value in stored.items() if name != _SECONDS}
    seconds = float(stored[_SECONDS]) if stored else 0.0
    return seconds, {n: {int(k): loss for k, loss in rows} for n, rows in losses.items()}
