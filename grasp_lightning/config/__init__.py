"""Typed configuration of the commands. No torch here, so that parsing and ``--help`` are quick.

``None`` means "not set by the user": presets and methods fill in what is left (see ``resolve``).
"""

from grasp_lightning.config.common import (
    CALIBRATION_STRATEGIES,
    CalibrationConfig,
    Dtype,
    EvaluationConfig,
    ModelConfig,
    Precision,
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
    LayerMetric,
    MethodConfig,
    MethodName,
    PlanConfig,
    PresetName,
    Reduction,
    Schedule,
    Score,
    Terms,
)
from grasp_lightning.config.measure import (
    BenchmarkConfig,
    CorpusWindows,
    EvaluateConfig,
)

__all__ = [
    "CALIBRATION_STRATEGIES",
    "BatchOrder",
    "BenchmarkConfig",
    "CalibrationConfig",
    "CompensateConfig",
    "CompressConfig",
    "CorpusWindows",
    "DistillationConfig",
    "Dtype",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "InstructionConfig",
    "LayerMetric",
    "LearningRateSchedule",
    "LoggersConfig",
    "LoraSettings",
    "MethodConfig",
    "MethodName",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "PlanConfig",
    "Precision",
    "PresetName",
    "Reduction",
    "Schedule",
    "Score",
    "Strategy",
    "Terms",
    "TextConfig",
    "TrainMode",
    "TrainerConfig",
    "TrainingConfig",
]
