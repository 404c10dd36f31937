"""Which weights a compensation keeps, and when it stops early."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

from grasp_lightning.callbacks.calibration_checkpoint import PassStore
from grasp_lightning.callbacks.trainable import compensation_module
from grasp_lightning.training.compensation import VALIDATION_LOSS


class BestWeights(L.Callback):
    """Keeps the trained parameters with the lowest validation loss, and restores them at the end.

    Attributes:
        step: The number of optimizer steps behind them; None before the first validation.
    """

    def __init__(self, store: PassStore) -> None:
        self._store = store
        self._loss = math.inf
        self.step: int | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the parameters if the loss is the lowest so far."""
        if trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics[VALIDATION_LOSS])
        if loss < self._loss:
            self._loss, self.step = loss, trainer.global_step
            self._store.save(compensation_module(pl_module).trained_state())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the best parameters before adapters are merged."""
        best = self._store.load() if self.step is not None else None
        if best is not None:
            compensation_module(pl_module).load_trained_state(best)

    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        """Return the lowest loss and its step; the parameters are in the store."""
        return {"loss": self._loss, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Continue from an earlier start."""
        self._loss, self.step = state_dict["loss"], state_dict["step"]


class ValidateLastStep(L.Callback):
    """Has the last step validated, wherever it is, so that its weights can be kept.

    Args:
        num_steps: Number of all steps.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Stop the training, since a Trainer validates before it stops."""
        trainer.should_stop |= batch_idx + 1 >= self._num_steps


class StopWithoutProgress(EarlyStopping):
    """Stops after ``patience`` validations without a lower loss, even right after a resume."""

    def __init__(self, patience: int) -> None:
        super().__init__(VALIDATION_LOSS, patience=patience, mode="min")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once if the checkpoint was saved when patience had run out."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
