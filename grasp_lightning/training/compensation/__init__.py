"""Training after compression: trainable parameters and the LightningModule."""

from grasp_lightning.training.compensation.adapters import (
    Trained,
    make_trainable,
    merge_adapters,
    resolve_targets,
    trainable_linears,
)
from grasp_lightning.training.compensation.module import VALIDATION_LOSS, CompensationModule
from grasp_lightning.training.compensation.objective import Teacher
from grasp_lightning.training.compensation.parameters import own_parameters, rewritten_parameters

__all__ = [
    "VALIDATION_LOSS",
    "CompensationModule",
    "Teacher",
    "Trained",
    "make_trainable",
    "merge_adapters",
    "own_parameters",
    "resolve_targets",
    "rewritten_parameters",
    "trainable_linears",
]
