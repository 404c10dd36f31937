"""From what the user set to complete options: presets, defaults, and keys without effect."""

from dataclasses import dataclass, replace
from typing import Final

from grasp_lightning.config import MethodConfig, Reduction, Schedule, Score, Terms
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
PRESETS: Final = {"paper": _PAPER}
DEFAULT_KEEP_RATIO = 0.1
_LOW_RANK_KEYS = ("preset", "keep_ratio", "terms", "reduction", "score", "schedule")


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
    config = _resolve_layers(config)
    if config.name == "drop":
        _refuse_ignored(
            config, _LOW_RANK_KEYS, "method drop deletes layers and scores no components"
        )
        return config
    keep_ratio = DEFAULT_KEEP_RATIO if config.keep_ratio is None else config.keep_ratio
    if not 0 <= keep_ratio < 1:
        raise ConfigError(
            f"method.keep_ratio must be at least 0 and below 1, got {keep_ratio}: it is the share "
            "of each matrix's parameters that is kept"
        )
    config = replace(config, keep_ratio=keep_ratio, preset=config.preset or "paper")
    preset = PRESETS[config.preset or "paper"]
    config = replace(
        config, score=config.score or preset.score, schedule=config.schedule or preset.schedule
    )
    if config.score == "magnitude":
        _refuse_ignored(config, ("terms", "reduction"), "score magnitude needs no gradients")
        return config
    return replace(
        config,
        terms=config.terms or preset.terms,
        reduction=config.reduction or preset.reduction,
    )


def _resolve_layers(config: MethodConfig) -> MethodConfig:
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
