"""Fit callbacks for a model that is split over processes, so that none holds all of it."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import lightning as L
import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.trainable import compensation_module
from grasp_lightning.data.batching import MicroBatch
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.errors import NumericsError


class Notes(Protocol):
    """Numbers that survive an interruption."""

    def note(self, key: str, value: float) -> None:
        """Keep a number."""

    def noted(self, key: str) -> float | None:
        """Return a number, None if it was not kept."""


class MeasureInFit(L.Callback):
    """Measures perplexity and validation loss before and after training, inside the fit.

    A split model can only run there. This callback must follow the one that chooses the weights to
    keep.

    Args:
        held_out: Windows for the perplexity; the same number of batches in every process.
        notes: Keeps what was measured before training.
        timed: Returns a block whose time counts as evaluation.

    Attributes:
        before: Perplexity, and validation loss (None without validation samples).
        after: The same after training.
    """

    def __init__(
        self,
        held_out: Sequence[MicroBatch],
        notes: Notes,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._held_out = held_out
        self._notes = notes
        self._timed = timed
        self.before: tuple[float, float | None] | None = None
        self.after: tuple[float, float | None] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, unless an earlier start has."""
        perplexity = self._notes.noted("perplexity_before")
        if perplexity is not None:
            self.before = perplexity, self._notes.noted("loss_before")
            return
        perplexity, loss = self.before = self._measured(trainer, pl_module)
        if loss is not None:
            self._notes.note("loss_before", loss)
        self._notes.note("perplexity_before", perplexity)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure again."""
        self.after = self._measured(trainer, pl_module)

    def _measured(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> tuple[float, float | None]:
        data: TrainingData = trainer.datamodule  # type: ignore[attr-defined]  # undeclared
        with self._timed():
            loss = _mean_loss(trainer, pl_module, self._held_out, is_text=True)
            samples = data.val_dataloader()
            validation = _mean_loss(trainer, pl_module, samples) if len(samples) else None
        try:
            return math.exp(loss), validation
        except OverflowError as error:
            raise NumericsError(
                f"the loss on the evaluation text is {loss}: its perplexity is too large for "
                "float64"
            ) from error


class GatherTrained(L.Callback):
    """Gathers the trained parameters, in float32 or finer, in the memory of rank 0.

    Attributes:
        state: Parameter name in the model -> values; empty in other processes.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather one parameter at a time."""
        del trainer
        module = compensation_module(pl_module)
        for name, value in module.iterate_trained():
            if processes.is_first():
                self.state[name.removeprefix("model.")] = value.cpu().clone()


def _mean_loss(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    batches: Iterable[MicroBatch | object],  # from a loader of any type
    *,
    is_text: bool = False,
) -> float:
    """Return the mean validation loss, from forward passes of the strategy.

    Args:
        is_text: The batches are held-out text, whose loss is the cross-entropy.
    """
    module = compensation_module(pl_module)
    was_training = module.model.training
    module.model.train(False)
    module.measures_text = is_text
    module.on_validation_epoch_start()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            trainer.strategy.validation_step(batch, index)
    module.model.train(was_training)
    module.measures_text = False
    return module.mean_validation_loss()
