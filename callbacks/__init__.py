"""Lightning callbacks that measure, compress and train: glue between library and Trainer."""

from callbacks.attribution import SingularAttribution
from callbacks.best_weights import BestWeights, StopWithoutProgress
from callbacks.export import ExportMergedModel
from callbacks.history import TrainingHistory
from callbacks.measure import TrainerMeasure
from callbacks.pruning import ReplaceRedundantLayers
from callbacks.similarity import LayerSimilarity
from callbacks.trainable import TrainableParameters
from callbacks.training_checkpoint import TrainingCheckpoint

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
