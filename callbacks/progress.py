"""Progress of calibration passes."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """A rich progress bar with a description of the pass instead of the epoch."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self._description = description

    def _get_train_description(self, current_epoch: int) -> str:
        del current_epoch
        return self._description

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what the bar shows: losses and speed, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    @property
    def predict_description(self) -> str:
        """Text in front of the bar of a forward pass."""
        return self._description
