"""Configuration of ``compress``, ``plan`` and ``export``."""

from dataclasses import dataclass, field
from typing import Literal

from grasp_lightning.config.common import (
    CalibrationConfig,
    EvaluationConfig,
    ModelConfig,
    TrainerConfig,
)

MethodName = Literal["grasp", "grasp_plus", "low_rank", "drop"]
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
class MethodConfig:
    """What is removed, and how it is chosen.

    Attributes:
        name: Compression method: grasp_plus, ranks and channels by loss curvature under one budget;
            grasp, the paper's; low_rank, parts or a preset of one's own choice; drop, deletion of
            layers.
        preset: Named set of options of grasp or low_rank; it fills only keys that are not set.
        layer_metric: How redundant layers are found when ``num_layers`` is given.
        num_layers: Number of decoder layers to replace or delete.
        layers: Explicit indices of decoder layers instead of ``num_layers``.
        keep_ratio: Share of each matrix's parameters that its factors keep, in [0, 1); under a
            global budget, of the parameters of all linears together.
        removed_ratio: Share of all the model's parameters to remove, instead of one of
            ``num_layers`` and ``keep_ratio``.
        terms: Parameters of a component that are scored: all of u, s, v, or s alone.
        reduction: How per-window scores are combined.
        score: taylor multiplies each gradient with its parameter, gradient does not, magnitude
            takes the singular values alone.
        schedule: one_shot scores all chosen layers in one pass; iterative replaces the last layer
            first, its MLP before its attention, and scores each with what is above replaced.
        score_all_layers: Score the components of all layers, so that ``from_scores`` can choose
            any of them later; one_shot only.
        weighting: Metric of the decompositions of low_rank and grasp_plus: none, fisher_rows
            (FWSVD), scale_columns (ASVD), input_gram (SVD-LLM), or kfac, the curvature of the loss.
        fisher: Whose gradients make the curvature of kfac: sampled, random ones with the covariance
            of labels drawn from the model's own predictions, which is the Fisher information;
            empirical, those of the text's own labels.
        ranks: uniform: one keep ratio for all matrices; global: the budget is spent where it hurts
            least.
        mlp: Under a global budget, what MLPs become: factors, like all other matrices, or MLPs with
            fewer channels, where those that cost the loss least go.
        removable: Under a global budget, what may go as a whole where its measured price is lower
            than that of cutting it: nothing, layers, or layers and the attention and MLP blocks in
            them. It needs weighting kfac, whose losses are in the unit of the price.
        multiple_of: Ranks and numbers of channels are multiples of this number.
        refit: Fit what was cut once more, in the order of the layers, on what it receives in the
            compressed model: prefix, to what the dense linear gives in the dense model; residual,
            to what the residual stream lacks.
        gradient_damping: Share of its mean diagonal that is added to the Gram matrix of gradients,
            at most 100.
        input_damping: The same for the Gram matrix of inputs.
    """

    name: MethodName = "grasp_plus"
    preset: PresetName | None = None
    layer_metric: LayerMetric | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    keep_ratio: float | None = None
    removed_ratio: float | None = None
    terms: Terms | None = None
    reduction: Reduction | None = None
    score: Score | None = None
    schedule: Schedule | None = None
    score_all_layers: bool | None = None
    weighting: Weighting | None = None
    fisher: FisherChoice | None = None
    ranks: RankChoice | None = None
    mlp: MlpChoice | None = None
    removable: RemovableChoice | None = None
    multiple_of: int | None = None
    refit: RefitChoice | None = None
    gradient_damping: float | None = None
    input_damping: float | None = None


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """What grasp_plus and low_rank measure.

    Attributes:
        max_memory: GB that Gram matrices may take, and then hidden states of a refit; more are
            measured in several passes, some layers each, or kept in files.
        store: Keep Gram matrices in the run folder, so that ``from_scores`` can cut at another
            ratio.
        measured_windows: Held-out windows on which each cut is measured by itself, for comparison
            with what curvature predicts; 0 measures none.
        priced_windows: Calibration windows on which the removal of each layer and block is priced,
            if ``method.removable`` lets them go.
    """

    max_memory: float = 8.0
    store: bool = True
    measured_windows: int = 1
    priced_windows: int = 2


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Everything that ``compress`` reads, and ``plan`` with it.

    Attributes:
        output_dir: Run folder that is written; ``plan`` needs none.
        overwrite: Delete what an earlier run wrote there.
        seed: Seed of the choice of calibration windows.
        from_scores: Run folder whose stored scores are cut again, without a pass over the data;
            its configuration is taken where no key is set.
        model: Which model.
        method: What is removed.
        calibration: Text to measure on.
        evaluation: Held-out text.
        trainer: Lightning settings.
        statistics: Limits of what is measured.
    """

    output_dir: str | None = None
    overwrite: bool = False
    seed: int = 0
    from_scores: str | None = None
    model: ModelConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CompressConfig):
    """Everything that ``plan`` reads: what ``compress`` does, and a compensation after it.

    Attributes:
        compensate: YAML file of ``compensate``, whose memory is told; None takes the defaults.
    """

    compensate: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything that ``export`` reads.

    Attributes:
        model: Folder of a compressed model, such as ``runs/x/model``.
        format: Shape of the copy; dense multiplies the factors back into ordinary weights.
        output_dir: Run folder that is written; the copy is in its folder ``model``.
        overwrite: Delete what an earlier run wrote there.
    """

    model: str
    format: Literal["dense"] = "dense"
    output_dir: str
    overwrite: bool = False
