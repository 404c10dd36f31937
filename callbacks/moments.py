"""Sums up inputs and output gradients of linears over the windows of a pass."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.models.mixtures import RoutedTokens, weights_of
from grasp_lightning.stats.base import Moments, Statistics, Step
from grasp_lightning.stats.moments import MomentSums
from grasp_lightning.stats.observer import InputObserver, LinearObserver
from grasp_lightning.training.calibration import Batch, CalibrationModule

S = TypeVar("S", bound="Sums")
_NUM_TOKENS = "num_tokens"


class Sums(Protocol):
    """Sums of which moments are the means."""

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""

    def check_seen(self) -> None:
        """Refuse a module that the model does not call."""

    def mean(self, num_tokens: int) -> Mapping[str, Moments]:
        """Return the moments of some tokens."""


class MomentMeasurement(Measurement, Generic[S]):
    """Measures moments, as a given step of a method requires; ``observe`` sets the sums."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given: Step | None = step
        self._sums: S  # set while hooks are attached
        self._num_tokens = 0

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the given step."""
        del module
        return self._given

    def start_batch(self, batch: Batch) -> None:
        """Count the tokens."""
        self._num_tokens += int(batch["mask"].sum())

    def check_seen(self) -> None:
        """Refuse a module that the model does not call."""
        self._sums.check_seen()

    def release(self) -> None:
        """Release the sums."""
        del self._sums
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums, and the number of tokens."""
        return {**self._sums.state(), _NUM_TOKENS: torch.tensor(self._num_tokens)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._sums.load_state(sums)
        self._num_tokens = int(sums[_NUM_TOKENS])

    def statistics(self) -> Statistics:
        """Return the moments."""
        return Statistics(moments=self._sums.mean(self._num_tokens))


class LinearMoments(MomentMeasurement[MomentSums]):
    """Measures Gram matrices of inputs and output gradients.

    Args:
        sources: Module -> the module whose input it shares, from ``shared_inputs``.
    """

    def __init__(self, step: Step, sources: Mapping[str, str]) -> None:
        super().__init__(step)
        self._sources = sources
        self._is_padding = False

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on the linears and experts."""
        view, needs = module.view, step.needs
        weights = weights_of(view, needs.moments)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._sums = MomentSums(shapes, needs.moment_kinds, self._sources, view.model.device)
        self._num_tokens = 0
        observer = LinearObserver if needs.is_backward else InputObserver
        return observer(view, needs.moments, self._add).attached()

    def _add(
        self, module: str, x: Tensor | RoutedTokens, grad_output: Tensor | None = None
    ) -> None:
        if not self._is_padding:
            self._sums.add(module, x, grad_output)

    def start_batch(self, batch: Batch) -> None:
        """Count the tokens; a batch without any is padding, which other processes wait for."""
        before = self._num_tokens
        super().start_batch(batch)
        self._is_padding = self._num_tokens == before
