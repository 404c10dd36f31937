"""Saves a running compensation, so that a killed or interrupted one resumes from there."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L

from grasp_lightning import processes
from grasp_lightning.callbacks.stop_request import StopRequest


class TrainingCheckpoint(L.Callback):
    """Saves a Trainer's checkpoint after steps, at intervals and before an interruption.

    It must be the last callback, so that the checkpoint includes what the others recorded. If a
    validation follows a step, the checkpoint is saved after it, so no validation is skipped or
    repeated.

    Args:
        store: Lets a function write the checkpoint to a path, replacing an earlier one.
    """

    def __init__(
        self,
        store: Callable[[Callable[[Path], None]], object],
        *,
        every_seconds: float,
        stop: StopRequest,
    ) -> None:
        self._store = store
        self._every_seconds = every_seconds
        self._stop = stop
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from the Trainer."""
        self._stop.take_over()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save, if it is time or the run should end, unless a validation is due first."""
        interval = trainer.val_check_batch
        validates = trainer.enable_validation and any(trainer.num_val_batches)
        # A training that has just been stopped is validated after this step, too.
        is_due = trainer.should_stop or (interval and (batch_idx + 1) % interval == 0)
        if not (validates and is_due):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, if it is time or the run should end."""
        if not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        is_due = time.monotonic() - self._saved_at >= self._every_seconds
        # All ranks save and stop at the same step; rank 0 decides when.
        is_due, number = processes.gather(is_due)[0], self._stop.agreed()
        if is_due or number is not None:
            self._store(partial(trainer.save_checkpoint, weights_only=False))
            self._saved_at = time.monotonic()
        if number is not None:
            self._stop.check()
