"""Lightning callbacks that measure and compress: the glue between the library and a Trainer."""

from callbacks.attribution import SingularAttribution
from callbacks.measure import TrainerMeasure
from callbacks.pruning import ReplaceRedundantLayers
from callbacks.similarity import LayerSimilarity

__all__ = ["LayerSimilarity", "ReplaceRedundantLayers", "SingularAttribution", "TrainerMeasure"]
