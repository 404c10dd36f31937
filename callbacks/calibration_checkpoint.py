"""Saves a running calibration pass, so that a killed or interrupted run goes on where it was."""

import time
from collections.abc import Mapping
from typing import Protocol

import lightning as L
from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.stats.base import Moments

_MOST_SAVING = 0.05  # share of the time


class PassStore(Protocol):
    """Keeps the state of the pass that runs, and no other."""

    def load(self) -> dict[str, Tensor] | None:
        """Return the state that was saved for this pass, or None."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Save the state of this pass in one step, in place of an earlier one."""


class GroupStore(Protocol):
    """Keeps the scores of groups of layers."""

    def load(self, number: int) -> Mapping[str, Tensor] | None:
        """Return the scores of a group; None if it was not finished."""

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the complete scores of a group."""


class StepStore(Protocol):
    """Keeps what is measured for the step that runs, in one pass or several."""

    def pass_store(self, part: str) -> PassStore:
        """Return what keeps the state of one of the passes."""

    def load_moments(self, part: str) -> Mapping[str, Moments] | None:
        """Return the moments that were kept of a pass, or None."""

    def keep_moments(self, moments: Mapping[str, Moments], part: str) -> Mapping[str, Moments]:
        """Keep the complete moments of a pass, and return them as they are kept."""

    @property
    def scored_groups(self) -> GroupStore:
        """What keeps the scores of groups of layers."""


class CalibrationCheckpoint(L.Callback):
    """Saves a measurement's sums at batch boundaries, every so often and before an interruption.

    A checkpoint has sums over windows and the indices of these windows, never the model: kilobytes
    to megabytes, and of Gram matrices as much as the model. Where saving takes long it is done less
    often, so that it takes a twentieth of the time at most.

    Args:
        measurement: The callback that measures; it must stand before this one in the Trainer.
        store: Where its state is kept.
        every_seconds: Seconds between saves.
        stop: Tells whether the run shall end.
    """

    def __init__(
        self,
        measurement: Measurement,
        store: PassStore,
        *,
        every_seconds: float,
        stop: StopRequest,
    ) -> None:
        self._measurement = measurement
        self._store = store
        self._every_seconds = every_seconds
        self._saving_seconds = 0.0
        self._stop = stop
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from the Trainer."""
        del trainer, pl_module
        self._stop.take_over()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Save, if it is time or the run shall end."""
        del trainer, args, kwargs
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
