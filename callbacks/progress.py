"""Progress of calibration passes."""

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """A rich progress bar that names the current step instead of an epoch.

    Args:
        description: What the pass measures, for the user.
    """

    def __init__(self, description: str) -> None:
        super().__init__()
        self._description = description

    def _get_train_description(self, current_epoch: int) -> str:
        del current_epoch
        return self._description

    @property
    def predict_description(self) -> str:
        """Text in front of the bar of a forward pass."""
        return self._description
