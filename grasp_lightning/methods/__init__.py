"""The one list of compression methods: a new method is one file and one entry here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from grasp_lightning.config import MethodConfig
from grasp_lightning.methods.base import CompressionMethod, Track, untracked
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.grasp import grasp
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.presets import DEFAULT_KEEP_RATIO, resolve_method
from grasp_lightning.stats.base import Scoring

__all__ = ["METHODS", "build_method", "configured_layers", "resolve_method"]


def configured_layers(config: MethodConfig) -> LayerChoice:
    """Return how a configuration chooses layers.

    Args:
        config: Options as ``resolve_method`` returns them.

    Returns:
        The choice.
    """
    return LayerChoice(
        layers=config.layers,
        num_layers=config.num_layers,
        metric=config.layer_metric or "similarity",
    )


def _grasp(config: MethodConfig, track: Track) -> CompressionMethod:
    scoring = Scoring(
        terms=config.terms or "full",
        reduction=config.reduction or "absolute",
        score=config.score or "taylor",
    )
    keep_ratio = DEFAULT_KEEP_RATIO if config.keep_ratio is None else config.keep_ratio
    return grasp(
        layers=configured_layers(config), scoring=scoring, keep_ratio=keep_ratio, track=track
    )


def _drop(config: MethodConfig, track: Track) -> CompressionMethod:
    del track
    return DropMethod(configured_layers(config))


METHODS: Final[Mapping[str, Callable[[MethodConfig, Track], CompressionMethod]]] = MappingProxyType(
    {"grasp": _grasp, "drop": _drop}
)


def build_method(config: MethodConfig, track: Track = untracked) -> CompressionMethod:
    """Return the method that a configuration names.

    Args:
        config: Options as ``resolve_method`` returns them.
        track: Shows the progress of long computations.

    Returns:
        The method.
    """
    return METHODS[config.name](config, track)
