"""Sums up inputs and output gradients of linears over the windows of a pass."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.models.mixtures import RoutedTokens, weights_of
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.moments import MomentSums
from grasp_lightning.stats.observer import InputObserver, LinearObserver
from grasp_lightning.training.calibration import Batch, CalibrationModule

_NUM_TOKENS = "num_tokens"


class LinearMoments(Measurement):
    """Measures Gram matrices of inputs and output gradients, as a step of a method requires.

    Args:
        sources: Module -> the module whose input it shares, from ``shared_inputs``.
    """

    def __init__(self, step: Step, sources: Mapping[str, str]) -> None:
        super().__init__()
        self._given: Step | None = step
        self._sources = sources
        self._sums: MomentSums  # set while hooks are attached
        self._num_tokens = 0
        self._is_padding = False

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the given step."""
        del module
        return self._given

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
        num_tokens = int(batch["mask"].sum())
        self._is_padding = num_tokens == 0
        self._num_tokens += num_tokens

    def check_seen(self) -> None:
        """Refuse a linear that the model does not call."""
        self._sums.check_seen()

    def release(self) -> None:
        """Release the sums."""
        del self._sums
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of all linears, and the number of tokens."""
        return {**self._sums.state(), _NUM_TOKENS: torch.tensor(self._num_tokens)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._sums.load_state(sums)
        self._num_tokens = int(sums[_NUM_TOKENS])

    def statistics(self) -> Statistics:
        """Return the moments of every linear."""
        return Statistics(moments=self._sums.mean(self._num_tokens))
