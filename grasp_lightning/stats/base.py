"""What a step asks to be measured, and what a measurement gives back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from grasp_lightning.config import FisherChoice, LayerMetric, Reduction, Score, Terms
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.factors import SVD


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How the gradients of singular components become scores.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6 (``full``, ``taylor``).

    Attributes:
        score: ``taylor``: theta * dL/dtheta; ``gradient``: dL/dtheta; ``magnitude``: the singular
            value itself, which needs no data.
        terms: Score all of u, s and v, or s alone.
        reduction: ``signed``: modulus after the sum over windows; ``absolute``: sum of the moduli
            of each window; ``squared``: sum over windows and elements of the squared term.
    """

    score: Score = "taylor"
    terms: Terms = "full"
    reduction: Reduction = "absolute"


MomentKind = Literal["input_gram", "gradient_gram", "input_scale", "fisher_columns"]
FORWARD_MOMENTS: frozenset[MomentKind] = frozenset({"input_gram", "input_scale"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Removable:
    """A decoder layer, or the attention or MLP block of one, that may go as a whole.

    Attributes:
        name: Unique among layers, blocks and linears.
        layer: Number of the layer in the original model.
        linears: Full names of its dense linears, in module order.
        parameters: How many go with it.
        is_block: True of a block, whose norms and biases stay.
    """

    name: str
    layer: int
    linears: tuple[str, ...]
    parameters: int
    is_block: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a step asks to be measured; the default asks for nothing.

    Attributes:
        layer_metric: Compare the hidden states that enter and leave decoder layers.
        span: Number of contiguous layers that the metric compares across.
        weight_gradients: Modules whose weight gradients are scored, in model order.
        scoring: How they are scored.
        more_groups: Modules of other layers that are scored as well, a group at a time, so that no
            more than one group needs memory for its decompositions.
        moments: Modules whose inputs and output gradients are summed up, in model order.
        moment_kinds: What is summed up of them.
        fisher: Whose gradients moments are made of; scores of weight gradients take the text's.
        removables: Layers and blocks whose removal is priced, each by itself.
    """

    layer_metric: LayerMetric | None = None
    span: int = 1
    weight_gradients: tuple[str, ...] = ()
    scoring: Scoring = Scoring()
    more_groups: tuple[tuple[str, ...], ...] = ()
    moments: tuple[str, ...] = ()
    moment_kinds: frozenset[MomentKind] = frozenset()
    fisher: FisherChoice = "empirical"
    removables: tuple[Removable, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if no pass over the data is needed."""
        asked = (self.layer_metric, *self.weight_gradients, *self.moment_kinds, *self.more_groups)
        return not any(asked)

    @property
    def is_backward(self) -> bool:
        """True if the pass needs gradients."""
        return bool(self.weight_gradients) or not self.moment_kinds <= FORWARD_MOMENTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One measurement and the decision that follows it.

    Attributes:
        name: What is done, in one word: select, attribution, curvature, drop.
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
class Moments:
    """What passed through one linear of N outputs and M inputs, as means over tokens.

    Linears that read the same input (q, k and v; gate and up) share its tensors. A gradient is that
    of the cross-entropy summed over the predicted tokens of a window, in nats, by the output, or a
    random one in its place (``Needs.fisher``).

    Attributes:
        input_gram: Mean of x x^T, ``(M, M)``.
        gradient_gram: Mean of g g^T, g = dL/dy, ``(N, N)``.
        input_scale: Mean of ``|x|``, ``(M,)``.
        fisher_columns: Mean over tokens of (dL/dW)^2, squared per window and summed over the
            outputs, ``(M,)``.
    """

    input_gram: Tensor | None = None
    gradient_gram: Tensor | None = None
    input_scale: Tensor | None = None
    fisher_columns: Tensor | None = None


class MergedMoments(Mapping[str, Moments]):
    """Moments of several passes, none of them read before it is asked for.

    Args:
        parts: Moments of each pass, of different linears.
    """

    def __init__(self, parts: Sequence[Mapping[str, Moments]]) -> None:
        self._owners = {module: part for part in parts for module in part}

    def __getitem__(self, module: str) -> Moments:
        """Return the moments of one linear."""
        return self._owners[module][module]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all linears."""
        return iter(self._owners)

    def __len__(self) -> int:
        """Return the number of linears."""
        return len(self._owners)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Result of one pass over the calibration windows.

    Attributes:
        layer_metric: Value of the asked metric for every start layer, float32, ``(L - span + 1,)``.
        component_scores: Score of every singular component, float32, ``(K,)`` per module, in nats
            per predicted token (squared reduction: nats squared per predicted token).
        more_scores: Scores and singular values of ``Needs.more_groups``, as they are stored.
        moments: What was summed up of linears, by module.
        removal_losses: What the removal of a layer or block by itself costs, in nats per predicted
            token, by its name.
    """

    layer_metric: Tensor | None = None
    component_scores: Mapping[str, Tensor] = field(default_factory=dict)
    more_scores: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    removal_losses: Mapping[str, float] = field(default_factory=dict)


def check_seen(num_windows: Mapping[str, int], consequence: str) -> None:
    """Refuse a linear whose weight the model reads without calling it, so that hooks miss it.

    Args:
        num_windows: Number of windows in which each linear was seen, by module.
        consequence: What cannot be done with it, for the message.

    Raises:
        ModelError: If one was seen less often than others, naming it.
    """
    most = max(num_windows.values(), default=0)
    for name, count in num_windows.items():
        if count != most:
            raise ModelError(
                f"{name} was seen in {count} of {most} windows: the model does not call it once "
                f"per pass, so {consequence}; leave its layer out"
            )
