"""The choice of redundant decoder layers, the first step of every layer-wise method."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_lightning.config import LayerMetric, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.methods.base import Decision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import drop_problem, kind_problem
from grasp_lightning.plan import OptionValue, SelectLayers
from grasp_lightning.stats.base import Needs, Statistics, Step

logger = logging.getLogger(__name__)

SELECT = "select"
GRADIENTS = "gradients"
"""Name of a step that scores layers by gradients."""


def score_key(metric: LayerMetric, span: int) -> str:
    """Return the name under which a metric is stored."""
    if metric == "angular":
        return "layer_angular_distance"
    return "layer_similarity" if span == 1 else "span_similarity"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """Explicit layers, or a number of layers and the metric that finds them.

    Source: similarity: Liu et al., "GRASP", arXiv:2501.00339, Eq. 1; angular: Gromov et al.,
    arXiv:2403.17887, the block of contiguous layers with the smallest angular distance;
    ``replaces_span``: Chen et al., arXiv:2403.19135, the block with the highest similarity.

    Attributes:
        layers: Explicit layer numbers, ascending; None to choose by metric.
        num_layers: Number of layers to replace or delete.
        replaces_span: One layer replaces contiguous layers: one more is chosen than are deleted.
        starts: First layers that a block of contiguous layers may have; None allows all.
    """

    layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    metric: LayerMetric = "similarity"
    replaces_span: bool = False
    starts: tuple[int, ...] | None = None

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the choice depends on."""
        if self.layers is not None:
            return {"layers": self.layers}
        return {"num_layers": self.num_layers, "layer_metric": self.metric}

    @property
    def step_name(self) -> str:
        """Name of the step that chooses the layers."""
        return SELECT

    @property
    def score_key(self) -> str:
        """Name under which the measured values are stored."""
        return score_key(self.metric, self._span)

    @property
    def count(self) -> int:
        """Number of layers to choose."""
        if self.layers is not None:
            return len(self.layers)
        return int(self.num_layers or 0) + self.replaces_span

    @property
    def is_contiguous(self) -> bool:
        """Whether the chosen layers are contiguous."""
        return self.replaces_span or (self.layers is None and self.metric == "angular")

    @property
    def _span(self) -> int:
        """Number of contiguous layers that the metric compares across."""
        return self.count if self.is_contiguous else 1

    def check(self, num_layers: int) -> None:
        """Refuse layers, or a number of them, that the model does not have: a ``ConfigError``."""
        if self.layers is not None:
            outside = [index for index in self.layers if index >= num_layers]
            if outside:
                raise ConfigError(
                    f"method.layers names {outside[0]}, but the model has layers "
                    f"0 to {num_layers - 1}"
                )
        elif self.count > num_layers:
            raise ConfigError(
                f"method.num_layers is {self.num_layers}, but the model has {num_layers} decoder "
                f"layers{', of which one must remain' if self.replaces_span else ''}"
            )
        elif self.starts is not None and num_layers - min(self.starts) < self.count:
            raise ConfigError(
                f"method.num_layers is {self.count}, but the model has only "
                f"{num_layers - min(self.starts)} decoder layers from layer {min(self.starts)} on, "
                "the first one that can be deleted"
            )

    def step(self, model: DecoderView) -> Step:
        """Return the step that chooses the layers; explicit ones need no measurement."""
        self.check(model.num_layers)
        if self.layers is not None:
            return Step(name=SELECT)
        return Step(name=SELECT, needs=Needs(layer_metric=self.metric, span=self._span))

    def chosen(self, stats: Statistics) -> tuple[int, ...]:
        """Return the chosen layers, ascending, by their numbers in the original model.

        A metric that is not finite is a ``NumericsError`` that names the layer.

        Raises:
            ValueError: If the metric is needed and was not measured.
        """
        if self.layers is not None:
            return self.layers
        values = self.values(stats)
        if values is None:
            raise ValueError(f"{self.score_key} was not measured")
        _check_metric(values)
        return self._best(values)

    def candidates(self, view: DecoderView) -> tuple[int, ...]:
        """Return the layers that may be chosen, by their numbers in the original model."""
        return view.layer_indices if self.layers is None else self.layers

    def values(self, stats: Statistics) -> Tensor | None:
        """Return the measured values that decide; None without a measurement."""
        return stats.layer_metric

    def decide(self, stats: Statistics, dropped_from: DecoderView | None = None) -> Decision:
        """Return the choice as one ``SelectLayers``, with the measured metric as a stored score.

        Layers that must stay are a ``ModelError`` if they are explicit, and skipped otherwise.

        Args:
            stats: The metric of every layer; not read for explicit layers.
            dropped_from: The model, if chosen layers are to be deleted.
        """
        metric, layers = self.values(stats), self.chosen(stats)
        if dropped_from is not None:
            layers = self._droppable(dropped_from, layers, metric)
        return Decision(
            operations=(SelectLayers(layers=layers),),
            scores={} if metric is None else {self.score_key: metric},
        )

    def check_drop(self, view: DecoderView) -> None:
        """Refuse explicit layers that cannot be deleted, with a ``ModelError``."""
        if self.layers is not None:
            self._droppable(view, self.layers, None)

    def _droppable(
        self, view: DecoderView, layers: tuple[int, ...], metric: Tensor | None
    ) -> tuple[int, ...]:
        """Return the best layers that can be deleted without breaking the model."""
        problem = self._problem(view, layers)
        if problem is None:
            return layers
        if self.layers is not None or metric is None:
            raise ModelError(f"method.layers={list(layers)} cannot be {self._change}: {problem}")
        others = self._best_droppable(view, metric)
        if others is None:
            raise ModelError(
                f"no {self.count} layers can be {self._change} ({problem}); lower "
                "method.num_layers, or replace layers with a keep_ratio above 0"
            )
        message = "layers %s are %s, not %s, which have better scores: %s"
        logger.warning(message, list(others), self._change, list(layers), problem)
        return others

    @property
    def _change(self) -> str:
        return "replaced by one" if self.replaces_span else "deleted"

    def _problem(self, view: DecoderView, layers: Sequence[int]) -> str | None:
        """Return in one line why layers cannot be chosen; None if they can."""
        if not self.replaces_span:
            return drop_problem(view, layers)
        return kind_problem(view, layers) or drop_problem(view, layers[1:])

    def _best_droppable(self, view: DecoderView, metric: Tensor) -> tuple[int, ...] | None:
        if self.is_contiguous:
            spans = self._spans(metric)
            return next((span for span in spans if self._problem(view, span) is None), None)
        return first_droppable(view, self._order(metric), self.count)

    def _best(self, values: Tensor) -> tuple[int, ...]:
        if self.is_contiguous:
            return next(self._spans(values))
        return tuple(sorted(self._order(values)[: self.count]))

    def _spans(self, values: Tensor) -> Iterator[tuple[int, ...]]:
        """Yield the spans that may be chosen, from the most redundant on."""
        for start in self._order(values):
            if self.starts is None or start in self.starts:
                yield tuple(range(start, start + self.count))

    def _order(self, values: Tensor) -> list[int]:
        """Return layers, or the starts of spans, from the most redundant on."""
        # A stable sort gives ties to the lower index, for any number of threads.
        most_first = self.metric == "similarity"
        order: list[int] = torch.sort(values, descending=most_first, stable=True).indices.tolist()
        return order


def first_droppable(view: DecoderView, order: Iterable[int], count: int) -> tuple[int, ...] | None:
    """Return the first layers of an order that can be deleted together, ascending.

    A layer that cannot go with those before it is skipped. None if there are too few.
    """
    found: list[int] = []
    for index in order:
        if len(found) < count and drop_problem(view, [*found, index]) is None:
            found.append(index)
    return tuple(sorted(found)) if len(found) == count else None


def configured_layers(config: MethodConfig) -> LayerChoice:
    """Return the choice of layers in complete options."""
    return LayerChoice(
        layers=config.layers,
        num_layers=config.num_layers,
        metric=config.layer_metric or "similarity",
        replaces_span=config.replacement is not None,
    )


def _check_metric(values: Tensor) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            f"hidden states at layer {bad[0]} are NaN or infinite; check the checkpoint, or set "
            "model.dtype to float32 if it is narrower"
        )
