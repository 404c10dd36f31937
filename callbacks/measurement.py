"""The base of measuring callbacks: hooks from the start of an epoch, statistics at its end."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Generic, Protocol, TypeVar

import lightning as L
import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.calibration import Batch, CalibrationModule

WINDOWS = "windows"
C = TypeVar("C", bound="Collector")


class Measurement(L.Callback):
    """Measures one step in one epoch of a fit, or in a predict.

    The result is appended to ``CalibrationModule.measured``, for later callbacks.

    Attributes:
        windows: Index of every window that was counted, in order.
    """

    def __init__(self) -> None:
        self.windows: list[int] = []
        self._step: Step | None = None
        self._done = False
        self._was_checked = False
        self._hooks = ExitStack()
        self._earlier: Mapping[str, Tensor] | None = None

    @abstractmethod
    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the step to measure in the coming epoch, or None if it is not known yet."""

    @abstractmethod
    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks that measure a step, to be held during the epoch."""

    @abstractmethod
    def start_batch(self, batch: Batch) -> None:
        """Read what hooks do not see: masks and targets."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """Return what was measured in the epoch."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """Return the sums over the windows so far."""

    @abstractmethod
    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""

    @abstractmethod
    def release(self) -> None:
        """Release the memory of the measurement: its Trainer may be kept."""

    def check_seen(self) -> None:
        """Refuse a linear that was not called in the first batch; the default checks nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far, and the windows in them."""
        return {**self.sums(), WINDOWS: torch.tensor(self.windows, dtype=torch.int64)}

    def go_on_from(self, state: Mapping[str, Tensor]) -> None:
        """Start the coming epoch with the ``state`` of an earlier, interrupted one.

        With several processes only rank 0 does so, since the sums are added at the end.
        """
        if not processes.is_first():
            return
        self._earlier = state
        self.windows = state[WINDOWS].tolist()

    def start(self, module: CalibrationModule) -> None:
        """Attach the hooks, if the step is known."""
        if self._done:
            return
        self._step = self.next_step(module)
        if self._step is not None:
            self._hooks.enter_context(self.observe(module, self._step))
            if self._earlier is not None:
                self.load_sums(self._earlier)

    def finish(self, module: CalibrationModule) -> None:
        """Remove the hooks, and leave the statistics on the module."""
        if self._done or self._step is None:
            return
        self._hooks.close()
        if processes.num_processes() > 1:
            self.load_sums(processes.summed(self.sums()))
            self.windows = [index for part in processes.gather(self.windows) for index in part]
        module.measured.append((self._step, self.statistics()))
        self._step, self._done = None, True
        self.release()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare for another fit."""
        self._step, self._done = None, False
        if self._earlier is None:
            self.windows = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach the hooks."""
        self.start(calibration_module(pl_module))

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Announce the batch to the hooks."""
        if self._step is None or self._done:
            return
        if len(batch["index"]) == 0:  # padding runs but does not count: it has no target either
            batch = {**batch, "mask": torch.zeros_like(batch["mask"])}
        self.start_batch(batch)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Record which windows were counted."""
        if self._step is not None and not self._done:
            self.windows += batch["index"].tolist()
            if not self._was_checked:
                self._was_checked = True
                self.check_seen()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks, and leave the statistics on the module."""
        self.finish(calibration_module(pl_module))

    # A pass without gradients is a predict.
    on_predict_epoch_start = on_train_epoch_start
    on_predict_batch_start = on_train_batch_start
    on_predict_batch_end = on_train_batch_end
    on_predict_epoch_end = on_train_epoch_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks when a run ends early."""
        self.close()

    def close(self) -> None:
        """Remove the hooks, without statistics."""
        self._hooks.close()


class Collector(Protocol):
    """Sums over the hidden states of a model, by hooks on its layers."""

    def attached(self) -> AbstractContextManager[None]:
        """Hook the model during a ``with`` block."""

    def start_batch(self, mask: Tensor) -> None:
        """Set the mask of the next forward pass, True for real tokens, ``(B, T)``."""

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""


class CollectorMeasurement(Measurement, Generic[C]):
    """A measurement whose sums are in a collector, which ``collector`` makes."""

    def __init__(self) -> None:
        super().__init__()
        self._collector: C  # set while hooks are attached

    @abstractmethod
    def collector(self, module: CalibrationModule, step: Step) -> C:
        """Return a collector with empty sums."""

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks of the collector."""
        self._collector = self.collector(module, step)
        return self._collector.attached()

    def start_batch(self, batch: Batch) -> None:
        """Read which tokens are real."""
        self._collector.start_batch(batch["mask"])

    def release(self) -> None:
        """Release the sums and hidden states."""
        del self._collector

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of the collector."""
        return self._collector.state()

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._collector.load_state(sums)


def calibration_module(module: L.LightningModule) -> CalibrationModule:
    """Return the module as a ``CalibrationModule``; another one is a TypeError."""
    if not isinstance(module, CalibrationModule):
        raise TypeError(f"this callback works on a CalibrationModule, got {type(module).__name__}")
    return module
