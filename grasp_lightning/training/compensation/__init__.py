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
from grasp_lightning.training.compensation.parameters import own_parameters, rewritten_parameters
from grasp_lightning.training.compensation.prediction import predictions_of

__all__ = [
    "VALIDATION_LOSS",
    "CachedTeacher",
    "CompensationModule",
    "Teacher",
    "Trained",
    "make_trainable",
    "merge_adapters",
    "own_parameters",
    "predictions_of",
    "resolve_targets",
    "rewritten_parameters",
    "trainable_linears",
]
