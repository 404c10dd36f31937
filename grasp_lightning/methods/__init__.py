"""The one list of compression methods: a new method is one file and one entry here."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from grasp_lightning.config import MethodConfig
from grasp_lightning.methods.base import CompressionMethod, Track, untracked
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.global_ranks import GlobalRanks
from grasp_lightning.methods.grasp import grasp
from grasp_lightning.methods.grasp_plus import grasp_plus, low_rank
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.presets import DEFAULT_KEEP_RATIO, resolve_method
from grasp_lightning.methods.rank_rules import BudgetRanks, RankRule, UniformRanks
from grasp_lightning.methods.weighting import Metric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.stats.base import Scoring

__all__ = [
    "METHODS",
    "build_method",
    "configured_layers",
    "configured_rank_rule",
    "resolve_method",
    "resolve_num_layers",
]


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


def configured_rank_rule(
    config: MethodConfig, num_parameters: int
) -> RankRule | GlobalRanks | None:
    """Return how many components each weight keeps.

    Args:
        config: Options as ``resolve_method`` returns them.
        num_parameters: Parameters of the whole dense model.

    Returns:
        The rule; None where layers are deleted.
    """
    if config.name == "drop" or config.keep_ratio == 0:
        return None
    if config.ranks == "global":
        return GlobalRanks(
            removed_ratio=config.removed_ratio,
            keep_ratio=config.keep_ratio,
            num_parameters=num_parameters,
            multiple_of=config.multiple_of or 1,
            mlp=config.mlp or "factors",
            removable=config.removable or "none",
        )
    if config.removed_ratio is not None:
        return BudgetRanks(removed_ratio=config.removed_ratio, num_parameters=num_parameters)
    return UniformRanks(keep_ratio=config.keep_ratio or DEFAULT_KEEP_RATIO)


def _grasp(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    scoring = Scoring(
        terms=config.terms or "full",
        reduction=config.reduction or "absolute",
        score=config.score or "taylor",
    )
    rule = configured_rank_rule(config, count_parameters(view.model))
    assert not isinstance(rule, GlobalRanks)  # resolve_method refuses it here
    return grasp(
        layers=configured_layers(config),
        scoring=scoring,
        rank_rule=rule,
        schedule=config.schedule or "one_shot",
        score_all_layers=bool(config.score_all_layers),
        track=track,
    )


def _weighted(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    assert config.weighting is not None  # resolve_method has filled it in
    make = grasp_plus if config.name == "grasp_plus" else low_rank
    return make(
        layers=configured_layers(config),
        rank_rule=configured_rank_rule(config, count_parameters(view.model)),
        metric=Metric(
            weighting=config.weighting,
            fisher=config.fisher or "empirical",
            gradient_damping=config.gradient_damping or 0.0,
            input_damping=config.input_damping or 0.0,
        ),
        refit=config.refit or "none",
        track=track,
    )


def _drop(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    del view, track
    return DropMethod(configured_layers(config))


METHODS: Final[Mapping[str, Callable[[MethodConfig, DecoderView, Track], CompressionMethod]]] = (
    MappingProxyType(
        {"grasp": _grasp, "grasp_plus": _weighted, "low_rank": _weighted, "drop": _drop}
    )
)


def build_method(
    config: MethodConfig, view: DecoderView, track: Track = untracked
) -> CompressionMethod:
    """Return the method that a configuration names.

    Args:
        config: Options as ``resolve_method`` returns them.
        view: The dense model: a budget is a share of its size.
        track: Shows the progress of long computations.

    Returns:
        The method. A budget that is out of reach is a ``ConfigError``.
    """
    return METHODS[config.name](resolve_num_layers(config, view), view, track)
