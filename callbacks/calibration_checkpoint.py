"""Saves a running calibration pass, so that a killed or interrupted run resumes from there."""

import time
from collections.abc import Mapping
from typing import Protocol

import lightning as L
from torch import Tensor

from grasp_lightning.callbacks.layer_fit import TrainingStore
from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.stats.base import DecidedLinears, Moments

_MOST_SAVING = 0.05  # share of the time


class PassStore(Protocol):
    """Keeps the state of the current pass only."""

    def load(self) -> dict[str, Tensor] | None:
        """Return the saved state of this pass, or None."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the saved state of this pass atomically."""


class GroupStore(Protocol):
    """Keeps the scores of groups of layers."""

    def load(self, number: int) -> Mapping[str, Tensor] | None:
        """Return the scores of a group; None if it was not finished."""

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the complete scores of a group."""


class StepStore(Protocol):
    """Keeps the measurements of the current step, made in one or more passes."""

    def pass_store(self, part: str) -> PassStore:
        """Return the store for the state of one pass."""

    def load_moments(self, part: str) -> Mapping[str, Moments] | None:
        """Return the stored moments of a pass, or None."""

    def keep_moments(self, moments: Mapping[str, Moments], part: str) -> Mapping[str, Moments]:
        """Keep the complete moments of a pass, and return them as stored."""

    def load_final_states(self) -> Tensor | None:
        """Return the stored final hidden states of the dense model, or None."""

    def keep_final_states(self, states: Tensor) -> None:
        """Keep the final hidden states of the dense model until the run ends."""

    @property
    def decided(self) -> DecidedLinears | None:
        """The store for what a decision computes for single linears; None: it stays in memory."""

    @property
    def training(self) -> TrainingStore:
        """The store for the checkpoint of a training."""

    @property
    def scored_groups(self) -> GroupStore:
        """The store for the scores of groups of layers."""

    @property
    def tried_truncations(self) -> GroupStore:
        """The store for the losses that a search has measured, as one group."""


class CalibrationCheckpoint(L.Callback):
    """Saves a measurement's sums at batch boundaries, at intervals and before an interruption.

    A checkpoint holds sums over windows and the indices of these windows, never the model: from
    kilobytes to, for Gram matrices, the size of the model. Saving takes at most a twentieth of the
    time: if it is slow, it happens less often. The measurement must precede this callback.
    """

    def __init__(
        self, measurement: Measurement, store: PassStore, *, every_seconds: float, stop: StopRequest
    ) -> None:
        self._measurement = measurement
        self._store = store
        self._every_seconds = every_seconds
        self._saving_seconds = 0.0
        self._stop = stop
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from the Trainer."""
        self._stop.take_over()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Save, if it is time or the run should end."""
        number = self._stop.agreed() if is_sharded(pl_module) else self._stop.signal_number
        start = time.monotonic()
        wait = max(self._every_seconds, self._saving_seconds / _MOST_SAVING)
        if start - self._saved_at >= wait or number is not None:
            self._store.save(self._measurement.state())
            self._saved_at = time.monotonic()
            self._saving_seconds = self._saved_at - start
        if number is not None:
            self._stop.check()

    # A pass without gradients is a predict.
    on_predict_start = on_train_start
    on_predict_batch_end = on_train_batch_end
