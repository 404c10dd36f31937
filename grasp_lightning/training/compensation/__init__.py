"""Training after compression: trainable parameters and the LightningModule."""

from grasp_lightning.training.compensation.adapters import (
    Trained,
    make_trainable,
    merge_adapters,
    resolve_targets,
    trainable_linears,
)
from grasp_lightning.training.compensation.module import VALIDATION_LOSS, CompensationModule
from grasp_lightning.training.compensation.objective import CachedTeacher, Teacher
from grasp_lightning.training.compensation.prediction import predictions_of

__all__ = [
    "VALIDATION_LOSS",
    "CachedTeacher",
    "CompensationModule",
    "Teacher",
    "Trained",
    "make_trainable",
    "merge_adapters",
    "predictions_of",
    "resolve_targets",
    "trainable_linears",
]
