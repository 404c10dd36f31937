"""The bar of a pass that a Trainer makes."""

from contextlib import ExitStack

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from grasp_lightning.progress import PassBar, pass_bar


class StepProgressBar(ProgressBar):
    """Shows a pass as a ``pass_bar`` of its batches, with the metrics that are logged for it.

    Args:
        description: What the pass does.
        share_done: Share of the pass that an earlier start has finished, and whose batches the
            Trainer does not get.
    """

    def __init__(self, description: str, share_done: float = 0.0) -> None:
        super().__init__()
        self._description = description
        self._share_done = share_done
        self._done = 0
        self._is_enabled = True
        self._expected: int | None = None
        self._open = ExitStack()
        self._bar: PassBar | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this in all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._is_enabled = True

    def expect(self, total: int) -> None:
        """Show progress towards this number of batches, instead of all that the Trainer gets."""
        self._expected = total
        if self._bar is not None:
            self._bar.expect(total)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Show the bar; a resumed training begins in the middle."""
        total = self.total_train_batches if self._expected is None else self._expected
        self._begin(total, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Count a batch."""
        metrics = self.get_metrics(trainer, pl_module)
        shown = [f"{name} {value:.3f}" for name, value in metrics.items() if name != "v_num"]
        self._count("  ".join(shown))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._end()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._begin(sum(trainer.num_predict_batches))

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Count a batch."""
        self._count()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, unless the validation is part of a training."""
        if trainer.state.fn is not TrainerFn.FITTING:
            self._begin(sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Count a batch."""
        if trainer.state.fn is not TrainerFn.FITTING:
            self._count()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar, unless the training continues."""
        if trainer.state.fn is not TrainerFn.FITTING:
            self._end()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar."""
        self._end()

    def _begin(self, num_batches: float, first: int = 0) -> None:
        """Show the bar, before batch number ``first`` of those that the Trainer gets."""
        if self._bar is not None or not self._is_enabled:
            return
        total = round(num_batches / (1 - self._share_done))
        self._done = total - round(num_batches) + first
        bar = pass_bar(self._description, total, done=self._done)
        self._bar = self._open.enter_context(bar)

    def _count(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._done, note)

    def _end(self) -> None:
        self._open.close()
        self._bar = None
