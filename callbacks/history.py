"""Keeps the losses of a compensation across interruptions, for its report."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from grasp_lightning.training.compensation import VALIDATION_LOSS


class TrainingHistory(L.Callback):
    """Losses by optimizer step; checkpoints hold them, so they survive a resume.

    Attributes:
        steps: Loss and learning rate of every step so far.
        validations: Number of steps taken, and validation loss.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.validations: list[tuple[int, float]] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,  # Any: Lightning's own type
        *args: object,
    ) -> None:
        """Record the result of a step."""
        assert isinstance(outputs, Mapping)  # a CompensationModule returns both
        self.steps.append((float(outputs["loss"]), float(outputs["learning_rate"])))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the validation loss."""
        if trainer.sanity_checking:
            return
        self.validations.append(
            (trainer.global_step, float(trainer.callback_metrics[VALIDATION_LOSS]))
        )

    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        """Return all losses."""
        return {"steps": self.steps, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Continue from the losses of an earlier start."""
        self.steps = list(state_dict["steps"])
        self.validations = list(state_dict["validations"])
