"""Sums up what linear maps for deleted decoder layers are fitted to."""

from grasp_lightning.callbacks.measurement import CollectorMeasurement
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.seams import SeamCollector
from grasp_lightning.training.calibration import CalibrationModule


class LayerSeams(CollectorMeasurement[SeamCollector]):
    """Measures the sums of all runs of layers that a step names, in one pass."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given = step

    def next_step(self, module: CalibrationModule) -> Step:
        """Return the given step."""
        del module
        return self._given

    def collector(self, module: CalibrationModule, step: Step) -> SeamCollector:
        """Return empty sums of all runs."""
        return SeamCollector(module.view, step.needs.seams)

    def statistics(self) -> Statistics:
        """Return the sums of each run."""
        return Statistics(seams=self._collector.sums())
