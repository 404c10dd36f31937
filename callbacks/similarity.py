"""Scores decoder layers by how little they change their hidden states."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.config import LayerMetric
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.layers import LayerMetricCollector
from grasp_lightning.training.calibration import Batch, CalibrationModule


class LayerSimilarity(Measurement):
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
        self._collector: LayerMetricCollector  # set while hooks are attached

    def next_step(self, module: CalibrationModule) -> Step:
        """Return the step that measures the metric."""
        if self._given is not None:
            return self._given
        module.layer_choice = self._choice
        return self._choice.step(module.view)

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on all decoder layers; a step without a layer metric is a ValueError."""
        if step.needs.layer_metric is None:
            raise ValueError(f"step {step.name!r} needs no layer metric")
        self._collector = LayerMetricCollector(
            module.view, step.needs.layer_metric, step.needs.span
        )
        return self._collector.attached()

    def start_batch(self, batch: Batch) -> None:
        """Read which tokens are real."""
        self._collector.start_batch(batch["mask"])

    def release(self) -> None:
        """Release the hidden states."""
        del self._collector

    def sums(self) -> dict[str, Tensor]:
        """Return the summed metric and the number of tokens."""
        return self._collector.state()

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._collector.load_state(sums)

    def statistics(self) -> Statistics:
        """Return the metric of every start layer."""
        return Statistics(layer_metric=self._collector.mean())
