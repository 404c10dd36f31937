"""Scores decoder layers by how little they change their hidden states."""

from grasp_lightning.callbacks.measurement import CollectorMeasurement
from grasp_lightning.config import LayerMetric
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.layers import LayerMetricCollector
from grasp_lightning.training.calibration import CalibrationModule


class LayerSimilarity(CollectorMeasurement[LayerMetricCollector]):
    """Measures a metric of every decoder layer in the first epoch, and chooses redundant layers.

    The module keeps the choice (``layer_choice``) for ``SingularAttribution`` in the next epoch and
    ``ReplaceRedundantLayers`` at the end of the fit.

    Args:
        num_layers: Number of layers to choose.
        metric: ``similarity``: mean cosine of input and output, highest first; ``angular``: the
            block of ``num_layers`` contiguous layers with the smallest angular distance.
        step: A method's step to measure instead of ``num_layers``.
    """

    def __init__(
        self,
        num_layers: int | None = None,
        metric: LayerMetric = "similarity",
        *,
        step: Step | None = None,
    ) -> None:
        super().__init__()
        if (num_layers is None) == (step is None):
            raise ValueError("give either num_layers or a step")
        self._choice = LayerChoice(num_layers=num_layers, metric=metric)
        self._given = step

    def next_step(self, module: CalibrationModule) -> Step:
        """Return the step that measures the metric."""
        if self._given is not None:
            return self._given
        module.layer_choice = self._choice
        return self._choice.step(module.view)

    def collector(self, module: CalibrationModule, step: Step) -> LayerMetricCollector:
        """Return empty sums of all layers; a step without a layer metric is a ValueError."""
        if step.needs.layer_metric is None:
            raise ValueError(f"step {step.name!r} needs no layer metric")
        return LayerMetricCollector(module.view, step.needs.layer_metric, step.needs.span)

    def statistics(self) -> Statistics:
        """Return the metric of every start layer."""
        return Statistics(layer_metric=self._collector.mean())
