"""What measuring callbacks share: hooks on when an epoch starts, statistics left at its end."""

from abc import abstractmethod
from contextlib import AbstractContextManager, ExitStack

import lightning as L

from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.calibration import Batch, CalibrationModule


class Measurement(L.Callback):
    """Measures one step in one epoch of a fit, or in a predict.

    The result is appended to ``CalibrationModule.measured``, where later callbacks find it.
    """

    def __init__(self) -> None:
        self._step: Step | None = None
        self._done = False
        self._hooks = ExitStack()

    @abstractmethod
    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the step to measure in the epoch that starts, or None if it is not yet known."""

    @abstractmethod
    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks that measure a step, to be held while the epoch runs."""

    @abstractmethod
    def start_batch(self, batch: Batch) -> None:
        """Take what the hooks cannot see: masks and targets."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """Return what was measured in the epoch."""

    def _start(self, pl_module: L.LightningModule) -> None:
        if self._done:
            return
        module = calibration_module(pl_module)
        self._step = self.next_step(module)
        if self._step is not None:
            self._hooks.enter_context(self.observe(module, self._step))

    def _finish(self, pl_module: L.LightningModule) -> None:
        if self._done or self._step is None:
            return
        self._hooks.close()
        calibration_module(pl_module).measured.append((self._step, self.statistics()))
        self._done = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the hooks on."""
        del trainer
        self._start(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Tell the hooks what batch comes."""
        del trainer, pl_module, batch_idx
        if self._step is not None and not self._done:
            self.start_batch(batch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the hooks off and leave the statistics on the module."""
        del trainer
        self._finish(pl_module)

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the hooks on."""
        del trainer
        self._start(pl_module)

    def on_predict_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tell the hooks what batch comes."""
        del dataloader_idx
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the hooks off and leave the statistics on the module."""
        del trainer
        self._finish(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off when a run ends early."""
        del trainer, pl_module, exception
        self._hooks.close()


def calibration_module(module: L.LightningModule) -> CalibrationModule:
    """Return the module as a ``CalibrationModule``.

    Args:
        module: What a Trainer runs.

    Returns:
        The same object.

    Raises:
        TypeError: If it is another LightningModule.
    """
    if not isinstance(module, CalibrationModule):
        raise TypeError(f"this callback works on a CalibrationModule, got {type(module).__name__}")
    return module
