"""What a step needs measured, and the statistics that a pass returns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from grasp_lightning.config import (
    DirectionsOf,
    FisherChoice,
    Grouping,
    Importance,
    LayerMetric,
    MetricOptions,
    Reduction,
    Score,
    Terms,
)
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.factors import SVD
from grasp_lightning.models.units import Units
from grasp_lightning.plan import MergeLayers, RemoveBlock


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How gradients of singular components become scores.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6 (``full``, ``taylor``).

    Attributes:
        score: ``taylor``: theta * dL/dtheta; ``gradient``: dL/dtheta; ``magnitude``: the singular
            value itself, without data.
        terms: Score u, s and v (``full``), or s alone.
        reduction: ``signed``: absolute value after the sum over windows; ``absolute``: sum of each
            window's absolute value; ``squared``: sum of squared terms over windows and elements.
    """

    score: Score = "taylor"
    terms: Terms = "full"
    reduction: Reduction = "absolute"


MomentKind = Literal["input_gram", "gradient_gram", "input_scale", "input_square", "fisher_columns"]
FORWARD_MOMENTS: frozenset[MomentKind] = frozenset({"input_gram", "input_scale", "input_square"})


RemovalMeasure = Literal["divergence", "loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Removable:
    """A decoder layer, or its attention or MLP block, that may be removed as a whole.

    Attributes:
        name: Unique among layers, blocks and linears.
        layer: Number of the layer in the original model.
        linears: Full names of its dense linears, in module order.
        parameters: How many a removal saves.
        is_block: True for a block, whose norms and biases are kept.
    """

    name: str
    layer: int
    linears: tuple[str, ...]
    parameters: int
    is_block: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanTraining:
    """The training of one decoder layer to compute what a span of layers computes.

    Attributes:
        layers: Numbers of the layers of the span, contiguous and ascending. The first is trained.
        parameters: Names of its trained parameters, inside the layer.
        removed: Blocks of it that are removed before the training.
        epochs: Passes over the windows; 0 leaves the layer as it is.
        learning_rate: Rate of the first step.
        step_windows: Windows per optimizer step.
    """

    layers: tuple[int, ...]
    parameters: tuple[str, ...]
    removed: tuple[RemoveBlock, ...] = ()
    epochs: int
    learning_rate: float
    step_windows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """A run of decoder layers that a linear map replaces.

    Attributes:
        layers: Numbers in the original model, ascending; no layer between them remains.
        source: Full name of the linear whose output the map reads; None if it reads the hidden
            states that enter the layers.
    """

    layers: tuple[int, ...]
    source: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamBases:
    """Bases of the hidden states at every place where a model reads them.

    Attributes:
        width: Number of directions, the same everywhere.
        directions_of: ``input``: of the hidden states as they are; ``normed``: of these divided by
            their root mean square, so that all tokens count equally.
    """

    width: int
    directions_of: DirectionsOf = "input"


class StreamBasis(NamedTuple):
    """The basis at one place.

    Attributes:
        basis: Orthonormal columns, ``(D, d)``, float32 or float64.
        variances: Sums of squares of the hidden states along all principal directions, falling,
            ``(D,)``, float32.
    """

    basis: Tensor
    variances: Tensor


class SeamSums(NamedTuple):
    """Sums over tokens of X, what a map reads, and D, what the layers add to the hidden states.

    Attributes:
        gram: ``X^T X``, ``(C, C)``, float64.
        cross: ``D^T X``, ``(C, C)``, float64.
    """

    gram: Tensor
    cross: Tensor


class Spread(NamedTuple):
    """How the inputs of a linear are distributed over the tokens of the text.

    Attributes:
        mean: ``(M,)``, float64.
        variance: With the number of tokens minus one as divisor, ``(M,)``, float64.
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Truncations that are tried one by one, and undone.

    Attributes:
        ranks: Ranks to try by full name of the linear, in model order. With a time limit, the
            first rank of each is tried in any case.
        metric: The metric of the decompositions, all keys set.
        seconds: How long ranks after the first are tried; None: until all are.
    """

    ranks: Mapping[str, tuple[int, ...]]
    metric: MetricOptions
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The two ends of a model, whose rows are measured by groups of tokens.

    Attributes:
        embedding: Full name of the embedding.
        head: Full name of the head.
        scale: What the embedding multiplies its rows by.
        special: Ids of tokens whose rows stay dense, ascending.
        metric: The metric of the factors that are tried, all keys set.
    """

    embedding: str
    head: str
    scale: float
    special: tuple[int, ...]
    metric: MetricOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a step needs measured; nothing by default.

    Attributes:
        layer_metric: Compares the hidden states that enter and leave decoder layers.
        span: Number of contiguous layers that the metric compares across.
        weight_gradients: Modules whose weight gradients are scored, in model order.
        scoring: How they are scored.
        more_groups: Modules of other layers to score, one group at a time, so that only one group's
            decompositions are in memory.
        moments: Modules whose inputs and output gradients are summed, in model order.
        moment_kinds: Which sums are taken.
        fisher: Which gradients moments use; scores of weight gradients use the text's labels.
        removables: Layers and blocks whose individual removal is measured.
        removal_measure: ``divergence``: how far the predictions move, on a few windows; ``loss``:
            the loss of the model without the part, on all windows.
        layer_gradients: Layers whose parameters are scored together, by their gradients.
        merge: A merge of layers that is tried and undone.
        span_training: A layer to train.
        seams: Runs of layers that linear maps replace.
        units: Blocks whose units are scored by the gradients of their weights.
        importance: How they are scored.
        grouping: Which key/value groups the scores of query heads count for.
        spreads: Linears of whose inputs mean and variance are taken.
        stream: Bases of the hidden states.
        sensitivity: Truncations of single linears, on a few windows; in a metric of ``moments``.
        vocabulary: Embedding and head, whose rows are measured together with ``moments``.
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
    removal_measure: RemovalMeasure = "divergence"
    layer_gradients: tuple[int, ...] = ()
    merge: MergeLayers | None = None
    span_training: SpanTraining | None = None
    seams: tuple[Seam, ...] = ()
    units: tuple[Units, ...] = ()
    importance: Importance = "taylor"
    grouping: Grouping = "heads"
    spreads: tuple[str, ...] = ()
    stream: StreamBases | None = None
    sensitivity: Sensitivity | None = None
    vocabulary: Vocabulary | None = None

    @property
    def is_empty(self) -> bool:
        """True if no pass over the data is needed."""
        asked = (self.layer_metric, *self.weight_gradients, *self.moment_kinds, *self.more_groups)
        parts = (*self.removables, *self.seams, *self.units, *self.spreads)
        others = (self.merge, self.span_training, self.stream, self.sensitivity, self.vocabulary)
        return not any((*asked, *parts, *others)) and not self.layer_gradients

    @property
    def is_shareable(self) -> bool:
        """True if another run can use the result, to the bit.

        Tried merges need an earlier measurement of the run, training depends on the batch size, and
        what a search finds within a time limit depends on the machine.
        """
        is_limited = self.sensitivity is not None and self.sensitivity.seconds is not None
        return not (self.is_empty or self.merge or self.span_training or is_limited)

    @property
    def is_backward(self) -> bool:
        """True if the pass needs gradients."""
        scored = (self.weight_gradients, self.layer_gradients, self.units, self.vocabulary)
        has_gradients = any(map(bool, scored))
        return has_gradients or not self.moment_kinds <= FORWARD_MOMENTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One measurement and the decision that follows it.

    Attributes:
        name: One word: select, attribution, curvature, drop, seam.
        layers: Original numbers of the decoder layers that this and later steps change, ascending:
            their inputs can be cached between passes. Moments that need no gradients belong to the
            first one. Empty if this is the only step.
        bases: Singular value decompositions of the scored weights, by module.
        ranks: Ranks to truncate weights to, by module; None leaves them to the decision.
        sparsity: Share of zeros in each weight; None leaves it to the decision.
    """

    name: str
    needs: Needs = Needs()
    layers: tuple[int, ...] = ()
    bases: Mapping[str, SVD] = field(default_factory=dict)
    ranks: Mapping[str, int] | None = None
    sparsity: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Means over tokens of the inputs and gradients of one linear of N outputs and M inputs.

    Linears that read the same input (q, k and v; gate and up) share its tensors. A gradient is
    the derivative of a window's cross-entropy, summed over predicted tokens in nats, with respect
    to the output, or a random one instead (``Needs.fisher``).

    Attributes:
        input_gram: Mean of x x^T, ``(M, M)``.
        gradient_gram: Mean of g g^T, g = dL/dy, ``(N, N)``.
        input_scale: Mean of ``|x|``, ``(M,)``.
        input_square: Mean of ``x^2``, ``(M,)``: the diagonal of the Gram matrix.
        fisher_columns: Mean over tokens of (dL/dW)^2, squared per window and summed over the
            outputs, ``(M,)``.
        gradient_square: Mean of ``g^2``, ``(N,)``; of a vocabulary alone, whose moments see
            ``stats.vocabulary``.
    """

    input_gram: Tensor | None = None
    gradient_gram: Tensor | None = None
    input_scale: Tensor | None = None
    input_square: Tensor | None = None
    fisher_columns: Tensor | None = None
    gradient_square: Tensor | None = None


class MergedMoments(Mapping[str, Moments]):
    """Lazily merged moments of several passes over different linears."""

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


class DecidedLinears(Protocol):
    """Keeps what a decision computes for single linears, for a later start and out of memory.

    Of several processes, each computes and saves some of the linears.
    """

    def missing(self, work: str, modules: Iterable[str]) -> list[str]:
        """Return the linears that are not computed yet; all processes must call it."""

    def claim(self, work: str, modules: Iterable[str]) -> None:
        """Announce the linears that the processes will save; all processes must call it."""

    def save(self, work: str, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a linear that was announced."""

    def load(self, work: str, modules: Iterable[str]) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of linears, read on access; all processes must call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Result of one pass over the calibration windows.

    Attributes:
        layer_metric: The metric for every start layer, float32, ``(L - span + 1,)``.
        component_scores: Score of every singular component, float32, ``(K,)`` per module, in nats
            per predicted token (squared reduction: nats squared per predicted token).
        more_scores: Scores and singular values of ``Needs.more_groups``, as they are stored.
        removal_losses: By name of a layer or block, in nats per predicted token: the divergence
            that its removal alone causes, or the loss without it (``Needs.removal_measure``).
        layer_scores: Gradient score of each of ``Needs.layer_gradients``, in nats per predicted
            token.
        merge_similarity: Mean cosine between the final hidden states of the model with the tried
            merge and those of the dense model, in [-1, 1].
        trained: Values of ``SpanTraining.parameters``, in the dtype of the model.
        seams: Sums of each run of layers that a linear map replaces.
        unit_scores: Importance of each unit, by the reader of its block, float64, ``(U,)``.
        spreads: Of the inputs of each of ``Needs.spreads``.
        stream: The basis at every place where the model reads its hidden states, by the name of the
            norm there.
        row_losses: By name of a group of rows, in nats per predicted token: the divergence that its
            factors of half the rank cause, on windows whose tokens were not counted.
        truncation_losses: Loss with a single linear truncated, by its name and rank, in nats per
            predicted token.
    """

    layer_metric: Tensor | None = None
    component_scores: Mapping[str, Tensor] = field(default_factory=dict)
    more_scores: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    removal_losses: Mapping[str, float] = field(default_factory=dict)
    layer_scores: Mapping[int, float] = field(default_factory=dict)
    merge_similarity: float | None = None
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    seams: Mapping[Seam, SeamSums] = field(default_factory=dict)
    unit_scores: Mapping[str, Tensor] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    stream: Mapping[str, StreamBasis] = field(default_factory=dict)
    row_losses: Mapping[str, float] = field(default_factory=dict)
    truncation_losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedStatistics(Statistics):
    """Statistics of a streamed model, whose decisions are kept out of memory.

    Attributes:
        decided: Where a decision keeps what it computes for single linears.
    """

    decided: DecidedLinears


def decided_store(statistics: Statistics) -> DecidedLinears | None:
    """Return where a decision keeps what it computes for single linears; None: in memory."""
    return statistics.decided if isinstance(statistics, StreamedStatistics) else None


def check_seen(
    num_windows: Mapping[str, int], consequence: str, remedy: str = "leave its layer out"
) -> None:
    """Refuse a linear whose weight the model reads without calling it, so that hooks miss it.

    Args:
        num_windows: Number of windows in which each linear was seen.
        consequence: What cannot be done with it, for the message.
        remedy: What to do instead, for the message.

    Raises:
        ModelError: If a linear was seen less often than others.
    """
    most = max(num_windows.values(), default=0)
    for name, count in num_windows.items():
        if count != most:
            raise ModelError(
                f"{name} was seen in {count} of {most} windows: the model does not call it once "
                f"per pass, so {consequence}; {remedy}"
            )
