"""What a step asks to be measured, and what a measurement gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from grasp_lightning.config import LayerMetric, Reduction, Score, Terms
from grasp_lightning.linalg.factors import SVD


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How the gradients of singular components become scores.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6 (``full``, ``taylor``).

    Attributes:
        terms: Score all of u, s and v, or s alone.
        reduction: ``signed``: modulus after the sum over windows; ``absolute``: sum of the moduli
            of each window; ``squared``: sum over windows and elements of the squared term.
        score: ``taylor``: theta * dL/dtheta; ``gradient``: dL/dtheta; ``magnitude``: the singular
            value itself, which needs no data.
    """

    terms: Terms = "full"
    reduction: Reduction = "absolute"
    score: Score = "taylor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a step asks to be measured; the default asks for nothing.

    Attributes:
        layer_metric: Compare the hidden states that enter and leave decoder layers.
        span: Number of contiguous layers that the metric compares across.
        weight_gradients: Modules whose weight gradients are scored, in model order.
        scoring: How they are scored.
    """

    layer_metric: LayerMetric | None = None
    span: int = 1
    weight_gradients: tuple[str, ...] = ()
    scoring: Scoring = Scoring()

    @property
    def is_empty(self) -> bool:
        """True if no pass over the data is needed."""
        return self.layer_metric is None and not self.weight_gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One measurement and the decision that follows it.

    Attributes:
        name: What is done, in one word: select, attribution, drop.
        needs: What must be measured first.
        layers: Decoder layers that this and coming steps change, ascending, as in the original
            model: what enters them can be kept between passes. Empty if this is the only step.
        bases: Singular value decompositions of the weights that are scored, by module.
        ranks: Ranks that weights are cut to, by module; None leaves them to the decision.
    """

    name: str
    needs: Needs = Needs()
    layers: tuple[int, ...] = ()
    bases: Mapping[str, SVD] = field(default_factory=dict)
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Result of one pass over the calibration windows.

    Attributes:
        layer_metric: Value of the asked metric for every start layer, float32, ``(L - span + 1,)``.
        component_scores: Score of every singular component, float32, ``(K,)`` per module, in nats
            per predicted token (squared reduction: nats squared per predicted token).
    """

    layer_metric: Tensor | None = None
    component_scores: Mapping[str, Tensor] = field(default_factory=dict)
