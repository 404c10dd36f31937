"""From what the user set to complete options: presets, defaults, and keys without effect."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from grasp_lightning.config import MethodConfig, PresetName, Reduction, Schedule, Score, Terms
from grasp_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Named options of low-rank methods; they fill only keys the user left unset.

    Attributes:
        terms: See ``MethodConfig``.
        reduction: See ``MethodConfig``.
        score: See ``MethodConfig``.
        schedule: See ``MethodConfig``.
    """

    terms: Terms
    reduction: Reduction
    score: Score
    schedule: Schedule


# Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6; one_shot: section 3.4 on pruning strategies.
_PAPER: Final = Preset(terms="full", reduction="absolute", score="taylor", schedule="one_shot")
# What the public code computes (LyoAI/GRASP), with labels shifted once.
_RELEASED: Final = Preset(terms="sigma", reduction="signed", score="taylor", schedule="iterative")
PRESETS: Final[Mapping[PresetName, Preset]] = MappingProxyType(
    {"paper": _PAPER, "released": _RELEASED}
)
DEFAULT_KEEP_RATIO = 0.1
_LOW_RANK_KEYS = (
    *("preset", "keep_ratio", "terms", "reduction", "score", "schedule", "score_all_layers"),
)


def resolve_method(config: MethodConfig) -> MethodConfig:
    """Return the options with preset and defaults filled in, after checking them.

    Args:
        config: What the user set; None means unset.

    Returns:
        Options in which None means "has no effect here".

    Raises:
        ConfigError: If a value is out of range, keys contradict each other, or a key would have
            no effect.
    """
    _check_removed_ratio(config)
    config = _resolve_layers(config)
    if config.name == "drop":
        _refuse_ignored(
            config, _LOW_RANK_KEYS, "method drop deletes layers and scores no components"
        )
        return config
    config = _resolve_keep_ratio(config)
    preset = PRESETS[config.preset or "paper"]
    config = replace(
        config,
        preset=config.preset or "paper",
        score=config.score or preset.score,
        schedule=config.schedule or preset.schedule,
    )
    if config.score_all_layers and config.schedule == "iterative":
        raise ConfigError(
            "method.score_all_layers would be ignored: schedule iterative scores each block with "
            "the blocks above it replaced; leave it unset, or use schedule one_shot"
        )
    if config.score == "magnitude":
        _refuse_ignored(config, ("terms", "reduction"), "score magnitude needs no gradients")
        return config
    return replace(
        config,
        terms=config.terms or preset.terms,
        reduction=config.reduction or preset.reduction,
    )


def _check_removed_ratio(config: MethodConfig) -> None:
    ratio = config.removed_ratio
    if ratio is None:
        return
    if not 0 < ratio < 1:
        raise ConfigError(
            f"method.removed_ratio must be above 0 and below 1, got {ratio}: it is the share of "
            "the whole model that goes"
        )
    has_layers = config.num_layers is not None or config.layers is not None
    layers_key = "method.layers" if config.layers is not None else "method.num_layers"
    if config.name == "drop" and has_layers:
        raise ConfigError(
            f"method drop takes method.removed_ratio or {layers_key}, not both; leave one unset"
        )
    if has_layers and config.keep_ratio is not None:
        raise ConfigError(
            f"method.removed_ratio, method.keep_ratio and {layers_key} say more than can hold at "
            "once; leave one of them unset"
        )
    if config.name != "drop" and not has_layers and config.keep_ratio is None:
        raise ConfigError(
            "method.removed_ratio needs one of method.num_layers, method.layers and "
            "method.keep_ratio beside it"
        )


def _resolve_keep_ratio(config: MethodConfig) -> MethodConfig:
    """Fill in the default, unless the ratio is solved from the removed ratio."""
    if config.removed_ratio is not None and config.keep_ratio is None:
        return config
    keep_ratio = DEFAULT_KEEP_RATIO if config.keep_ratio is None else config.keep_ratio
    if not 0 <= keep_ratio < 1:
        raise ConfigError(
            f"method.keep_ratio must be at least 0 and below 1, got {keep_ratio}: it is the share "
            "of each matrix's parameters that is kept"
        )
    return replace(config, keep_ratio=keep_ratio)


def _resolve_layers(config: MethodConfig) -> MethodConfig:
    if config.removed_ratio is not None and config.layers is None and config.num_layers is None:
        return replace(config, layer_metric=config.layer_metric or "similarity")
    if (config.layers is None) == (config.num_layers is None):
        both = "both are set" if config.layers is not None else "neither is set"
        raise ConfigError(f"set exactly one of method.num_layers and method.layers ({both})")
    if config.layers is not None:
        _refuse_ignored(config, ("layer_metric",), "method.layers is explicit")
        return replace(config, layers=_checked_layers(config.layers))
    if config.num_layers is not None and config.num_layers < 1:
        raise ConfigError(f"method.num_layers must be at least 1, got {config.num_layers}")
    return replace(config, layer_metric=config.layer_metric or "similarity")


def _checked_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers:
        raise ConfigError("method.layers must name at least one layer, got an empty list")
    negative = [index for index in layers if index < 0]
    if negative:
        raise ConfigError(f"method.layers counts from 0 and cannot be negative, got {negative[0]}")
    repeated = sorted({index for index in layers if layers.count(index) > 1})
    if repeated:
        raise ConfigError(f"method.layers names layer {repeated[0]} more than once")
    return tuple(sorted(layers))


def _refuse_ignored(config: MethodConfig, keys: tuple[str, ...], reason: str) -> None:
    ignored = [f"method.{key}" for key in keys if getattr(config, key) is not None]
    if ignored:
        raise ConfigError(f"{', '.join(ignored)} would be ignored: {reason}; leave it unset")
