"""Sums up what linear maps for deleted decoder layers are fitted to."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.seams import SeamCollector
from grasp_lightning.training.calibration import Batch, CalibrationModule


class LayerSeams(Measurement):
    """Measures the sums of all runs of layers that a step names, in one pass."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given = step
        self._collector: SeamCollector  # set while hooks are attached

    def next_step(self, module: CalibrationModule) -> Step:
        """Return the given step."""
        del module
        return self._given

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on the layers."""
        self._collector = SeamCollector(module.view, step.needs.seams)
        return self._collector.attached()

    def start_batch(self, batch: Batch) -> None:
        """Read which tokens are real."""
        self._collector.start_batch(batch["mask"])

    def release(self) -> None:
        """Release the sums and hidden states."""
        del self._collector

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of all runs."""
        return self._collector.state()

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._collector.load_state(sums)

    def statistics(self) -> Statistics:
        """Return the sums of each run."""
        return Statistics(seams=self._collector.sums())
