"""Typed configuration of the commands. No torch here, so that parsing and ``--help`` are quick.

None means that the user did not set a key: presets and methods fill it in.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from grasp_lightning.config.common import (
    CALIBRATION_STRATEGIES,
    CalibrationConfig,
    Dtype,
    EvaluationConfig,
    ModelConfig,
    Strategy,
    TrainerConfig,
)
from grasp_lightning.config.compensate import (
    BatchOrder,
    CompensateConfig,
    DistillationConfig,
    InstructionConfig,
    LearningRateSchedule,
    LoggersConfig,
    LoraSettings,
    Objective,
    OptimizerConfig,
    TextConfig,
    TrainingConfig,
    TrainMode,
)
from grasp_lightning.config.compress import (
    CompressConfig,
    ExportConfig,
    PlanConfig,
    StatisticsConfig,
)
from grasp_lightning.config.measure import BenchmarkConfig, EvaluateConfig
from grasp_lightning.config.method import (
    METHOD_OPTIONS,
    AmountOptions,
    BlockChoice,
    BudgetOptions,
    CriterionChoice,
    DampingOptions,
    DropOptions,
    FisherChoice,
    GradientOptions,
    GraspOptions,
    LayerMetric,
    LowRankOptions,
    MethodConfig,
    MethodOptions,
    MetricOptions,
    MlpChoice,
    PresetName,
    RandomOptions,
    Reduction,
    RefitChoice,
    RemovableChoice,
    Schedule,
    Score,
    ShortenedLlamaOptions,
    TargetChoice,
    Terms,
    Unit,
    Weighting,
)

CONFIGS: Final[Mapping[str, type]] = MappingProxyType(
    {
        "compress": CompressConfig,
        "compensate": CompensateConfig,
        "plan": PlanConfig,
        "evaluate": EvaluateConfig,
        "benchmark": BenchmarkConfig,
        "export": ExportConfig,
    }
)
"""The configuration of each command."""

__all__ = [
    "CALIBRATION_STRATEGIES",
    "CONFIGS",
    "METHOD_OPTIONS",
    "AmountOptions",
    "BatchOrder",
    "BenchmarkConfig",
    "BlockChoice",
    "BudgetOptions",
    "CalibrationConfig",
    "CompensateConfig",
    "CompressConfig",
    "CriterionChoice",
    "DampingOptions",
    "DistillationConfig",
    "DropOptions",
    "Dtype",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FisherChoice",
    "GradientOptions",
    "GraspOptions",
    "InstructionConfig",
    "LayerMetric",
    "LearningRateSchedule",
    "LoggersConfig",
    "LoraSettings",
    "LowRankOptions",
    "MethodConfig",
    "MethodOptions",
    "MetricOptions",
    "MlpChoice",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "PlanConfig",
    "PresetName",
    "RandomOptions",
    "Reduction",
    "RefitChoice",
    "RemovableChoice",
    "Schedule",
    "Score",
    "ShortenedLlamaOptions",
    "StatisticsConfig",
    "Strategy",
    "TargetChoice",
    "Terms",
    "TextConfig",
    "TrainMode",
    "TrainerConfig",
    "TrainingConfig",
    "Unit",
    "Weighting",
]
