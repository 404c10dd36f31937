"""Options of compression methods: every key stands once, in options that several methods may read.

Unset keys are None: presets and defaults of a method fill them in. ``MethodConfig`` is all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

LayerMetric = Literal["similarity", "angular"]
Terms = Literal["full", "sigma"]
Reduction = Literal["signed", "absolute", "squared"]
Score = Literal["taylor", "gradient", "magnitude"]
Schedule = Literal["one_shot", "iterative"]
PresetName = Literal["paper", "released", "svd_llm", "asvd", "fwsvd"]
Weighting = Literal["none", "fisher_rows", "scale_columns", "input_gram", "kfac"]
FisherChoice = Literal["sampled", "empirical"]
RankChoice = Literal["uniform", "global"]
MlpChoice = Literal["factors", "channels"]
RefitChoice = Literal["none", "prefix", "residual"]
RemovableChoice = Literal["none", "layers", "layers_and_blocks"]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which method, on which layers: what every method reads.

    Attributes:
        name: Compression method: grasp_plus, ranks and channels by loss curvature under one budget;
            grasp, the paper's; low_rank, parts or a preset of one's own choice; drop, deletion of
            layers; or the name of one that another installed package adds.
        layer_metric: How redundant layers are found when ``num_layers`` is given.
        num_layers: Number of decoder layers to replace or delete.
        layers: Explicit indices of decoder layers instead of ``num_layers``.
        removed_ratio: Share of all the model's parameters to remove, instead of one of
            ``num_layers`` and ``keep_ratio``.
    """

    name: str = "grasp_plus"
    layer_metric: LayerMetric | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    removed_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """How much stays.

    Attributes:
        keep_ratio: Share of each matrix's parameters that its factors keep, in [0, 1), where 0
            deletes the layers; under a global budget, of the parameters of all linears together.
    """

    keep_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """Options that have a name together.

    Attributes:
        preset: Named set of options of grasp or low_rank; it fills only keys that are not set.
    """

    preset: PresetName | None = None


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """How gradients of components become scores.

    Attributes:
        terms: Parameters of a component that are scored: all of u, s, v, or s alone.
        reduction: How per-window scores are combined.
    """

    terms: Terms | None = None
    reduction: Reduction | None = None


@dataclass(frozen=True, kw_only=True)
class GraspOptions(GradientOptions, PresetOptions, KeepOptions, MethodOptions):
    """What grasp reads.

    Attributes:
        score: taylor multiplies each gradient with its parameter, gradient does not, magnitude
            takes the singular values alone.
        schedule: one_shot scores all chosen layers in one pass; iterative replaces the last layer
            first, its MLP before its attention, and scores each with what is above replaced.
        score_all_layers: Score the components of all layers, so that ``from_scores`` can choose
            any of them later; one_shot only.
    """

    score: Score | None = None
    schedule: Schedule | None = None
    score_all_layers: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DampingOptions:
    """What keeps a metric from being singular.

    Attributes:
        gradient_damping: Share of its mean diagonal that is added to the Gram matrix of gradients,
            at most 100.
        input_damping: The same for the Gram matrix of inputs.
    """

    gradient_damping: float | None = None
    input_damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class MetricOptions(DampingOptions):
    """How large a change of a weight counts.

    Attributes:
        weighting: Metric of the decompositions of low_rank and grasp_plus: none, fisher_rows
            (FWSVD), scale_columns (ASVD), input_gram (SVD-LLM), or kfac, the curvature of the loss.
        fisher: Whose gradients make the curvature of kfac: sampled, random ones with the covariance
            of labels drawn from the model's own predictions, which is the Fisher information;
            empirical, those of the text's own labels.
    """

    weighting: Weighting | None = None
    fisher: FisherChoice | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What one budget is spent on.

    Attributes:
        mlp: Under a global budget, what MLPs become: factors, like all other matrices, or MLPs with
            fewer channels, where those that cost the loss least go.
        removable: Under a global budget, what may go as a whole where its measured price is lower
            than that of cutting it: nothing, layers, or layers and the attention and MLP blocks in
            them. It needs weighting kfac, whose losses are in the unit of the price.
        multiple_of: Ranks and numbers of channels are multiples of this number.
    """

    mlp: MlpChoice | None = None
    removable: RemovableChoice | None = None
    multiple_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(BudgetOptions, MetricOptions, PresetOptions, KeepOptions, MethodOptions):
    """What low_rank and grasp_plus read.

    Attributes:
        ranks: uniform: one keep ratio for all matrices; global: the budget is spent where it hurts
            least.
        refit: Fit what was cut once more, in the order of the layers, on what it receives in the
            compressed model: prefix, to what the dense linear gives in the dense model; residual,
            to what the residual stream lacks.
    """

    ranks: RankChoice | None = None
    refit: RefitChoice | None = None


@dataclass(frozen=True, kw_only=True)
class MethodConfig(LowRankOptions, GraspOptions):
    """What is removed, and how it is chosen: the keys of all methods."""


METHOD_OPTIONS: Final[Mapping[str, type[MethodOptions]]] = MappingProxyType(
    {
        "grasp": GraspOptions,
        "grasp_plus": LowRankOptions,
        "low_rank": LowRankOptions,
        "drop": MethodOptions,
    }
)
