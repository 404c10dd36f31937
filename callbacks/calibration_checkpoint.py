"""Saves a running calibration pass, so that a killed or interrupted run goes on where it was."""

import time
from collections.abc import Mapping
from typing import Protocol

import lightning as L
from torch import Tensor

from callbacks.measurement import Measurement
from callbacks.stop_request import StopRequest
from grasp_lightning.models.sharding import is_sharded


class PassStore(Protocol):
    """Keeps the state of the pass that runs, and no other."""

    def load(self) -> dict[str, Tensor] | None:
        """Return the state that was saved for this pass, or None."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Save the state of this pass in one step, in place of an earlier one."""


class CalibrationCheckpoint(L.Callback):
    """Saves a measurement's sums at batch boundaries, every so often and before an interruption.

    A checkpoint has kilobytes to megabytes: sums over windows and the indices of these windows,
    never the model.

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
        self._stop = stop
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from the Trainer."""
        del trainer, pl_module
        self._stop.take_over()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from the Trainer."""
        del trainer, pl_module
        self._stop.take_over()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Save, if it is time or the run shall end."""
        del trainer, args
        self._end_batch(pl_module)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Save, if it is time or the run shall end."""
        del trainer, args
        self._end_batch(pl_module)

    def _end_batch(self, module: L.LightningModule) -> None:
        number = self._stop.agreed() if is_sharded(module) else self._stop.signal_number
        is_due = time.monotonic() - self._saved_at >= self._every_seconds
        if is_due or number is not None:
            self._store.save(self._measurement.state())
            self._saved_at = time.monotonic()
        if number is not None:
            self._stop.check()
