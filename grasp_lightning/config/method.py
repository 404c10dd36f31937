"""Options of the methods: each key is declared once, in options that several methods may read.

Unset keys are None; presets and the defaults of a method fill them in. ``MethodConfig`` has all
keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, Literal

from grasp_lightning.config.values import Positive, Range, Seed

LayerMetric = Literal["similarity", "angular"]
Terms = Literal["full", "sigma"]
Reduction = Literal["signed", "absolute", "squared"]
Score = Literal["taylor", "gradient", "magnitude"]
Schedule = Literal["one_shot", "iterative"]
PresetName = Literal[
    "paper",
    "released",
    "svd_llm",
    "svd_llm_update",
    "svd_llm_v2",
    "asvd",
    "asvd_search",
    "fwsvd",
]
Weighting = Literal["none", "fisher_rows", "scale_columns", "input_gram", "kfac"]
FisherChoice = Literal["sampled", "empirical"]
RankChoice = Literal["uniform", "per_type", "global", "sensitivity"]
MlpChoice = Literal["factors", "channels"]
RefitChoice = Literal["none", "prefix", "residual"]
BlockChoice = Literal["attention", "mlp"]
Unit = Literal["layers", "attention", "mlp"]
RemovableChoice = Literal["none", "layers", "layers_and_blocks"]
SeamChoice = Literal["none", "linear"]
TargetChoice = Literal["any", "no_factors", "gguf", "plain"]
EmbeddingsChoice = Literal["none", "factors"]
VocabularyChoice = Literal["keep", "corpus"]
CriterionChoice = Literal["taylor_plus", "taylor", "perplexity"]
Importance = Literal["taylor", "taylor_second", "taylor_mixed", "l2"]
Grouping = Literal["heads", "released"]
MergeChoice = Literal["paper", "released"]
ReplacementChoice = Literal["layer", "mlp"]
PatternChoice = Literal["unstructured", "2:4", "4:8"]
DirectionsOf = Literal["input", "normed"]


@dataclass(frozen=True, kw_only=True)
class AmountOptions:
    """Which method, and how much it removes: what every method reads.

    Attributes:
        name: grasp_plus: ranks and MLP channels by the curvature of the loss, under one budget;
            grasp: the method of the GRASP paper; low_rank: factorizes all linears, by a preset or
            by parts of your choice; drop: deletes layers; replaceme: deletes contiguous layers and
            folds a linear map into the MLP before them; llm_streamline: replaces contiguous layers
            with one trained layer; laco: merges layers; shortgpt: deletes the layers of lowest
            block influence; sleb: deletes the layers that a greedy search by the loss finds;
            shortened_llama: deletes the layers of lowest importance by gradients or loss;
            llm_pruner: removes attention heads and MLP channels of lowest importance by gradients,
            the same share of each layer; flap: removes those whose inputs vary least, and adds
            biases to compensate; slicegpt: makes the hidden states smaller; random: deletes layers
            drawn at random; wanda and sparsegpt: set weights to zero, which saves no memory; or a
            method of another installed package.
        num_layers: Number of decoder layers to replace or delete.
        removed_ratio: Share of all parameters to remove, or, for wanda and sparsegpt, to set to
            zero; replaces ``num_layers`` or ``keep_ratio``.
        vocabulary: corpus: first remove the tokens that ``tokens.corpora`` never use, with their
            rows in embedding and head, which ``removed_ratio`` counts; keep, or unset: all stay.
    """

    name: str = "grasp_plus"
    num_layers: int | None = None
    removed_ratio: float | None = None
    vocabulary: VocabularyChoice | None = None


@dataclass(frozen=True, kw_only=True)
class MethodOptions(AmountOptions):
    """On which layers: what every method reads that does not insist on a choice of its own.

    Attributes:
        layer_metric: How to find redundant layers when ``num_layers`` is given.
        layers: Indices of decoder layers, instead of ``num_layers``.
    """

    layer_metric: LayerMetric | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class KeepOptions:
    """How much is kept.

    Attributes:
        keep_ratio: Share of each matrix's parameters that its factors keep, in [0, 1), where 0
            deletes the layers. Under one budget: share of the parameters of all linears together.
            For slicegpt: share of the directions of the hidden states.
    """

    keep_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """Sets of options under one name.

    Attributes:
        preset: Named set of options of grasp or low_rank; keys that you set override it.
    """

    preset: PresetName | None = None


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """How gradients of components become scores.

    Attributes:
        terms: Scored parameters of a component: full (u, s and v) or sigma (s alone).
        reduction: How to combine the scores of the windows.
    """

    terms: Terms | None = None
    reduction: Reduction | None = None


@dataclass(frozen=True, kw_only=True)
class GraspOptions(GradientOptions, PresetOptions, KeepOptions, MethodOptions):
    """What grasp reads.

    Attributes:
        score: taylor multiplies each gradient by its parameter, gradient does not, magnitude takes
            only the singular values.
        schedule: one_shot scores all chosen layers in one pass; iterative works from the last layer
            down, MLP before attention, and scores each block after those above it are replaced.
        score_all_layers: Score all layers, so that ``from_scores`` can choose any of them later;
            one_shot only.
    """

    score: Score | None = None
    schedule: Schedule | None = None
    score_all_layers: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DampingOptions:
    """What keeps a metric from being singular.

    Attributes:
        gradient_damping: Share of the mean diagonal to add to the Gram matrix of gradients, at most
            100.
        input_damping: The same for the Gram matrix of inputs.
    """

    gradient_damping: float | None = None
    input_damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class MetricOptions(DampingOptions):
    """How the change of a weight is measured.

    Attributes:
        weighting: Metric of the decompositions of low_rank and grasp_plus: none, fisher_rows
            (FWSVD), scale_columns (ASVD), input_gram (SVD-LLM), or kfac, the curvature of the loss.
        fisher: Gradients for the curvature of kfac: sampled: random gradients with the covariance
            that labels drawn from the model's predictions would give (Fisher information);
            empirical: gradients of the text's labels.
    """

    weighting: Weighting | None = None
    fisher: FisherChoice | None = None


@dataclass(frozen=True, kw_only=True)
class RoundingOptions:
    """How sizes are rounded.

    Attributes:
        multiple_of: Ranks, numbers of channels and directions are multiples of this number; unset:
            1, or 32 for the targets gguf and plain.
    """

    multiple_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(RoundingOptions):
    """What one budget is spent on.

    Attributes:
        mlp: Under a global budget, factors: factorize the matrices of MLPs like all others;
            channels: remove the hidden channels of MLPs and experts that affect the loss least, and
            whole experts.
        removable: Under a global budget, parts that may be removed as a whole if that costs less
            loss than compressing them: none, layers, or layers_and_blocks (also attention and MLP
            blocks). Needs weighting kfac, whose losses have the same unit as a measured removal.
        target: What will run the model. any: programs that can run factors, such as transformers;
            no_factors and gguf (llama.cpp): attention stays dense, and each MLP gets its own width;
            plain: all MLPs get the same width, so that the folder is an ordinary one that opens
            anywhere.
    """

    mlp: MlpChoice | None = None
    removable: RemovableChoice | None = None
    target: TargetChoice | None = None


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """A search by measured losses.

    Attributes:
        search_minutes: Minutes after which ``ranks: sensitivity`` measures no more; each linear is
            measured at least once. Unset: no limit. With a limit, the measured losses, and so the
            ranks, depend on the speed of the machine.
    """

    search_minutes: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(
    SearchOptions, BudgetOptions, MetricOptions, PresetOptions, KeepOptions, MethodOptions
):
    """What low_rank reads, and grasp_plus, too.

    Attributes:
        ranks: uniform: one keep ratio for all matrices; per_type: the same on average, but among
            matrices of one name in all layers, those with a larger truncation loss keep more
            (weighting input_gram only); global: one budget for all, spent where it reduces the
            predicted loss most; sensitivity: one budget for all, by the measured loss with a single
            matrix truncated, for each matrix and each keep ratio of 0.1, 0.2, ... 0.9.
        refit: Refit the compressed linears layer by layer, on their inputs in the compressed model.
            prefix fits each linear to its output in the dense model; residual refits the linears
            that write to the residual stream, to reduce the accumulated error.
        refit_pull: How strongly a refit is pulled towards the truncated weights. 0: least squares;
            1: half of the way to it.
    """

    ranks: RankChoice | None = None
    refit: RefitChoice | None = None
    refit_pull: Annotated[float, Range(at_least=0, at_most=100)] | None = None


@dataclass(frozen=True, kw_only=True)
class GraspPlusOptions(LowRankOptions):
    """What grasp_plus reads.

    Attributes:
        embeddings: factors: tokens are grouped by how often they occur, and the rows of a group in
            embedding and head become low-rank factors if the budget decides so; none: embedding and
            head stay dense.
    """

    embeddings: EmbeddingsChoice | None = None


@dataclass(frozen=True, kw_only=True)
class LacoOptions(AmountOptions):
    """What laco reads.

    Attributes:
        merge: paper: each merged layer is its weights plus the sum of the differences of those
            merged into it; released: what the public code computes, the linears of the last merged
            layer with the norms of the first.
        merge_layers: Number of contiguous layers that become one, at least 2; the last merge may
            take fewer.
        interval: After an accepted merge, the search continues this many layers lower.
        threshold: Lowest cosine between the final hidden states of the merged and the dense model;
            each further sweep over the layers lowers it by 0.05, until enough layers are merged.
    """

    merge: MergeChoice | None = None
    merge_layers: int | None = None
    interval: int | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class RidgeOptions:
    """How a linear map that replaces deleted layers is fitted.

    Attributes:
        ridge: Ridge of the least-squares fit of a linear map, as a share of the mean diagonal of
            the Gram matrix of its inputs, at most 100.
    """

    ridge: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReplaceMeOptions(RidgeOptions, MethodOptions):
    """What replaceme reads."""


@dataclass(frozen=True, kw_only=True)
class DropOptions(RidgeOptions, MethodOptions):
    """What drop reads.

    Attributes:
        unit: What is deleted: whole layers, or only their attention or MLP blocks.
        seam: linear: for each run of deleted layers, a matrix is added to the model that maps the
            hidden states that enter the run to those that leave it; none: only delete.
    """

    unit: Unit | None = None
    seam: SeamChoice | None = None


@dataclass(frozen=True, kw_only=True)
class RandomOptions(AmountOptions):
    """What random reads.

    Attributes:
        layer_seed: Seed for drawing the layers; unset: the seed of the run.
    """

    layer_seed: Seed | None = None


@dataclass(frozen=True, kw_only=True)
class ProtectOptions:
    """Which layers stay as they are.

    Attributes:
        protect_first: Number of layers at the start that are never deleted or made smaller.
        protect_last: The same at the end.
    """

    protect_first: int | None = None
    protect_last: int | None = None


@dataclass(frozen=True, kw_only=True)
class ShortenedLlamaOptions(ProtectOptions, AmountOptions):
    """What shortened_llama reads.

    Attributes:
        criterion: How layers are scored: taylor: by gradient times weight, summed over all
            parameters of a layer; taylor_plus: the same, with protected layers; perplexity: by the
            loss of the model without the layer.
    """

    criterion: CriterionChoice | None = None


@dataclass(frozen=True, kw_only=True)
class LlmPrunerOptions(ProtectOptions, AmountOptions):
    """What llm_pruner reads.

    Attributes:
        importance: How heads and channels are scored: taylor: by gradient times weight, in absolute
            value, summed over all their weights; taylor_second: by the squared gradients of single
            windows; taylor_mixed: by both; l2: by the squared weights, without text.
        grouping: Which key/value group the score of a query head counts for, out of G. heads: the
            group that it reads; released: what the public code does, group i modulo G for head i.
    """

    importance: Importance | None = None
    grouping: Grouping | None = None


@dataclass(frozen=True, kw_only=True)
class StreamlineOptions(MethodOptions):
    """What llm_streamline reads.

    Attributes:
        replacement: What replaces the contiguous layers: the first of them (layer), or only its MLP
            block (mlp); it is trained to compute the output of all of them.
        epochs: Passes of the training over the calibration windows; 0: none.
        learning_rate: Learning rate of the first step; it falls to 2.5 % of this value.
        step_windows: Calibration windows per optimizer step.
    """

    replacement: ReplacementChoice | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    step_windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(MethodOptions):
    """What wanda and sparsegpt read.

    Attributes:
        pattern: Where the zeros are: unstructured, or 2 of each 4 or 4 of each 8 consecutive
            weights of a row, which is half of the weights of the linears.
    """

    pattern: PatternChoice | None = None


@dataclass(frozen=True, kw_only=True)
class SliceOptions(RoundingOptions, KeepOptions, AmountOptions):
    """What slicegpt reads.

    Attributes:
        directions_of: Which hidden states choose the directions that are kept. input: those that
            enter a block; normed: those after its norm, so that all tokens count equally.
    """

    directions_of: DirectionsOf | None = None


@dataclass(frozen=True, kw_only=True)
class MethodConfig(
    SparsityOptions,
    RandomOptions,
    LlmPrunerOptions,
    ShortenedLlamaOptions,
    ReplaceMeOptions,
    DropOptions,
    StreamlineOptions,
    LacoOptions,
    SliceOptions,
    GraspPlusOptions,
    GraspOptions,
):
    """What to remove and how to choose it: the keys of all methods."""


METHOD_OPTIONS: Final[Mapping[str, type[AmountOptions]]] = MappingProxyType(
    {
        "grasp": GraspOptions,
        "grasp_plus": GraspPlusOptions,
        "low_rank": LowRankOptions,
        "drop": DropOptions,
        "shortgpt": MethodOptions,
        "sleb": AmountOptions,
        "shortened_llama": ShortenedLlamaOptions,
        "llm_pruner": LlmPrunerOptions,
        "flap": AmountOptions,
        "random": RandomOptions,
        "laco": LacoOptions,
        "llm_streamline": StreamlineOptions,
        "replaceme": ReplaceMeOptions,
        "slicegpt": SliceOptions,
        "wanda": SparsityOptions,
        "sparsegpt": SparsityOptions,
    }
)
