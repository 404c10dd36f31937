"""Keeps the losses of a compensation across interruptions, for its report."""

import statistics
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from grasp_lightning.training.compensation import VALIDATION_LOSS


class TrainingHistory(L.Callback):
    """Losses and speeds by optimizer step; checkpoints hold them, so they survive a resume.

    Attributes:
        steps: Loss and learning rate of every step so far.
        speeds: Predicted tokens per second of every step.
        validations: Number of steps taken, and validation loss.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.speeds: list[float] = []
        self.validations: list[tuple[int, float]] = []

    @property
    def median_speed(self) -> float | None:
        """Predicted tokens per second of the median step, which other load affects least."""
        return statistics.median(self.speeds) if self.speeds else None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,  # Any: Lightning's own type
        *args: object,
    ) -> None:
        """Record the result of a step."""
        assert isinstance(outputs, Mapping)  # a CompensationModule returns them
        self.steps.append((float(outputs["loss"]), float(outputs["learning_rate"])))
        self.speeds.append(float(outputs["tokens_per_second"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the validation loss."""
        if trainer.sanity_checking:
            return
        self.validations.append((len(self.steps), float(trainer.callback_metrics[VALIDATION_LOSS])))

    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        """Return all losses and speeds."""
        return {"steps": self.steps, "speeds": self.speeds, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Continue from the losses of an earlier start."""
        self.steps = list(state_dict["steps"])
        self.speeds = list(state_dict.get("speeds", ()))  # an earlier version keeps none
        self.validations = list(state_dict["validations"])
