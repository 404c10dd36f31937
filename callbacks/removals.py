"""Measures the loss of a model without each of some layers or blocks."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.calibration import Batch, CalibrationModule


class LossWithoutParts(Measurement):
    """Adds up the losses that a ``CalibrationModule`` with ``removables`` predicts.

    Args:
        step: The step whose removables the module has.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given = step
        self._sums = torch.zeros(len(step.needs.removables), dtype=torch.float64)
        self._num_tokens = 0
        self._dtype = torch.float32

    def next_step(self, module: CalibrationModule) -> Step:
        """Return the given step."""
        self._dtype = module.model.dtype
        return self._given

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return no hooks: the module returns the losses."""
        return nullcontext()

    def start_batch(self, batch: Batch) -> None:
        """Count the predicted tokens."""
        self._num_tokens += int(batch["targets"][:, 1:].sum())

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Add the losses of a batch, and record which windows were counted."""
        assert isinstance(outputs, Tensor)  # the module has removables
        self._sums += outputs
        self.on_train_batch_end(trainer, pl_module, outputs, batch)

    def sums(self) -> dict[str, Tensor]:
        """Return the summed losses and the number of predicted tokens."""
        return {"losses": self._sums.clone(), "num_tokens": torch.tensor(self._num_tokens)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._sums, self._num_tokens = sums["losses"].clone(), int(sums["num_tokens"])

    def release(self) -> None:
        """Do nothing: the sums are small."""

    def statistics(self) -> Statistics:
        """Return the mean losses.

        Raises:
            NumericsError: If a loss is NaN or infinite.
        """
        names = [part.name for part in self._given.needs.removables]
        losses = dict(zip(names, (self._sums / self._num_tokens).tolist(), strict=True))
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise NumericsError(
                    f"the calibration loss without {name} is {loss}; {nan_advice(self._dtype)}"
                )
        return Statistics(removal_losses=losses)
