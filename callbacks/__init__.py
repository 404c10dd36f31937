"""Lightning callbacks that measure, compress and train: glue between library and Trainer.

The package is ``grasp_lightning.callbacks``. In a checkout its folder is at the top, where
``import callbacks`` gives the same modules.
"""

import pkgutil
import sys
from importlib import import_module

from grasp_lightning.callbacks.attribution import SingularAttribution
from grasp_lightning.callbacks.best_weights import BestWeights, StopWithoutProgress
from grasp_lightning.callbacks.export import ExportMergedModel
from grasp_lightning.callbacks.history import TrainingHistory
from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.callbacks.pruning import ReplaceRedundantLayers
from grasp_lightning.callbacks.similarity import LayerSimilarity
from grasp_lightning.callbacks.trainable import TrainableParameters
from grasp_lightning.callbacks.training_checkpoint import TrainingCheckpoint

__all__ = [
    "BestWeights",
    "ExportMergedModel",
    "LayerSimilarity",
    "ReplaceRedundantLayers",
    "SingularAttribution",
    "StopWithoutProgress",
    "TrainableParameters",
    "TrainerMeasure",
    "TrainingCheckpoint",
    "TrainingHistory",
]

if __name__ == "callbacks":
    for module in pkgutil.iter_modules(__path__):
        sys.modules[f"callbacks.{module.name}"] = import_module(
            f"grasp_lightning.callbacks.{module.name}"
        )
    sys.modules["callbacks"] = sys.modules["grasp_lightning.callbacks"]
