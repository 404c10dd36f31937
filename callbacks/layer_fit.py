"""Fits decoder layers to hidden states: what ``llm_streamline`` and ``objective: local`` share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import lightning as L
from torch.utils.data import DataLoader, Dataset

from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.training.layer_training import LayerData, LayerModule


class TrainingStore(Protocol):
    """Keeps the checkpoint of the running training."""

    def load(self) -> str | None:
        """Return the path of the checkpoint, or None; all processes must call this."""

    def save(self, write: Callable[[Path], None]) -> None:
        """Let a function write the checkpoint, in all processes; it replaces an earlier one."""


def fit_layers(
    trainer: L.Trainer,
    module: LayerModule,
    data: LayerData,
    store: TrainingStore | None,
    stop: StopRequest,
) -> None:
    """Train from the last checkpoint, if any; signals are deferred to the next step."""
    with stop.deferred():
        trainer.fit(
            module,
            train_dataloaders=data.steps,
            val_dataloaders=DataLoader(_Batches(data.validation), batch_size=None),
            ckpt_path=None if store is None else store.load(),
            weights_only=True,
        )


class _Batches(Dataset[list[int]]):
    """Batches of window numbers."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[int]:
        return self._batches[index]
