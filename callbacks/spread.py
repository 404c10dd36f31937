"""Measures mean and variance of the inputs of linears."""

from grasp_lightning.callbacks.measurement import CollectorMeasurement
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.spread import SpreadCollector
from grasp_lightning.training.calibration import CalibrationModule


class InputSpreads(CollectorMeasurement[SpreadCollector]):
    """Measures the inputs of all linears that a step names, in one forward pass."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given = step

    def next_step(self, module: CalibrationModule) -> Step:
        """Return the given step."""
        del module
        return self._given

    def collector(self, module: CalibrationModule, step: Step) -> SpreadCollector:
        """Return empty sums."""
        return SpreadCollector(module.view, step.needs.spreads)

    def check_seen(self) -> None:
        """Refuse a linear that the model does not call."""
        self._collector.check_seen()

    def statistics(self) -> Statistics:
        """Return mean and variance of the inputs of each linear."""
        return Statistics(spreads=self._collector.spreads())
