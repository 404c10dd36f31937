"""Configuration of ``compress``, ``plan`` and ``export``."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from grasp_lightning.config.common import (
    CalibrationConfig,
    EvaluationConfig,
    ModelConfig,
    TrainerConfig,
)
from grasp_lightning.config.method import MethodConfig
from grasp_lightning.config.values import Count, PathName, Positive, Range, Seed


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

    max_memory: Positive = 8.0
    store: bool = True
    measured_windows: Annotated[int, Range(at_least=0, claim="cannot be negative")] = 1
    priced_windows: Count = 2


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

    output_dir: PathName | None = None
    overwrite: bool = False
    seed: Seed = 0
    from_scores: PathName | None = None
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

    compensate: PathName | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything that ``export`` reads.

    Attributes:
        model: Folder of a compressed model, such as ``runs/x/model``.
        format: Shape of the copy; dense multiplies the factors back into ordinary weights.
        output_dir: Run folder that is written; the copy is in its folder ``model``.
        overwrite: Delete what an earlier run wrote there.
    """

    model: PathName
    format: Literal["dense"] = "dense"
    output_dir: PathName
    overwrite: bool = False
