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
        max_memory: GB for Gram matrices, then for hidden states of a refit; beyond it, layers are
            measured in several passes, or hidden states are kept in files.
        store: Keep Gram matrices in the run folder: ``from_scores`` can then cut at another ratio.
        measured_windows: Held-out windows to measure each cut on by itself, for comparison with the
            prediction of curvature; 0: none.
        priced_windows: Calibration windows to price the removal of each layer and block on, if
            ``method.removable`` allows it.
    """

    max_memory: Positive = 8.0
    store: bool = True
    measured_windows: Annotated[int, Range(at_least=0, claim="cannot be negative")] = 1
    priced_windows: Count = 2


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Everything that ``compress`` and ``plan`` read.

    Attributes:
        output_dir: Run folder to write; ``plan`` needs none.
        overwrite: Delete what an earlier run wrote there.
        dry_run: Check everything that is quick, print what ``plan`` prints, and write nothing.
        seed: Seed of the choice of calibration windows.
        from_scores: Run folder whose stored scores are cut again, without a pass over the data;
            keys that are not set are taken from its configuration.
        model: Which model.
        method: What to remove.
        calibration: Text to measure on.
        evaluation: Held-out text.
        trainer: Lightning settings.
        statistics: Limits of what is measured.
    """

    output_dir: PathName | None = None
    overwrite: bool = False
    dry_run: bool = False
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
    """Everything that ``plan`` reads: what ``compress`` does, and a later compensation.

    Attributes:
        compensate: YAML file of ``compensate``, whose memory is predicted; None: the defaults.
    """

    compensate: PathName | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything that ``export`` reads.

    Attributes:
        model: Folder of a compressed model, such as ``runs/x/model``.
        format: Format of the copy; dense multiplies the factors back into ordinary weights.
        output_dir: Run folder to write; the copy is in its folder ``model``.
        overwrite: Delete what an earlier run wrote there.
    """

    model: PathName
    format: Literal["dense"] = "dense"
    output_dir: PathName
    overwrite: bool = False
