"""From what the user set to complete options: presets, defaults, and keys without effect."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from grasp_lightning.config import (
    MethodConfig,
    MlpChoice,
    PresetName,
    RankChoice,
    Reduction,
    RefitChoice,
    Schedule,
    Score,
    Terms,
    Weighting,
)
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.weighting import GRADIENT_DAMPING, INPUT_DAMPING, Metric

_LARGEST_DAMPING: Final = 100


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


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedPreset:
    """Named options of methods that truncate in a metric.

    Attributes:
        weighting: See ``MethodConfig``.
        ranks: See ``MethodConfig``.
        mlp: See ``MethodConfig``.
        refit: See ``MethodConfig``.
        input_damping: See ``MethodConfig``.
    """

    weighting: Weighting
    ranks: RankChoice = "uniform"
    mlp: MlpChoice = "factors"
    refit: RefitChoice = "none"
    input_damping: float = INPUT_DAMPING


WEIGHTED_PRESETS: Final[Mapping[PresetName, WeightedPreset]] = MappingProxyType(
    {
        "svd_llm": WeightedPreset(weighting="input_gram"),
        "asvd": WeightedPreset(weighting="scale_columns"),
        "fwsvd": WeightedPreset(weighting="fisher_rows"),
    }
)
_PLAIN = WeightedPreset(weighting="none")
_PLUS = WeightedPreset(
    weighting="kfac", ranks="global", mlp="channels", refit="residual", input_damping=1e-2
)
DEFAULT_KEEP_RATIO = 0.1
DEFAULT_REMOVED_RATIO = 0.2
_SCORING_KEYS = ("terms", "reduction", "score", "schedule", "score_all_layers")
_DAMPING_KEYS = ("gradient_damping", "input_damping")
_GLOBAL_KEYS = ("mlp", "removable", "multiple_of")
_WEIGHTED_KEYS = ("weighting", "fisher", "ranks", *_GLOBAL_KEYS, "refit", *_DAMPING_KEYS)
_LOW_RANK_KEYS = ("preset", "keep_ratio", *_SCORING_KEYS, *_WEIGHTED_KEYS)


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
    if config.name in ("low_rank", "grasp_plus"):
        return _resolve_weighted(config)
    _check_removed_ratio(config)
    config = _resolve_layers(config)
    if config.name == "drop":
        _refuse_ignored(
            config, _LOW_RANK_KEYS, "method drop deletes layers and scores no components"
        )
        return config
    _refuse_ignored(
        config, _WEIGHTED_KEYS, "method grasp scores plain components; see grasp_plus and low_rank"
    )
    config = _resolve_keep_ratio(config)
    preset = PRESETS[_checked_preset(config, tuple(PRESETS)) or "paper"]
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


def _resolve_weighted(config: MethodConfig) -> MethodConfig:
    """Return the options of a method that truncates in a metric, all layers by default."""
    _refuse_ignored(
        config,
        _SCORING_KEYS,
        f"method {config.name} keeps the largest components",
        remedy="set method.name=grasp",
    )
    if config.layers is not None or config.num_layers is not None:
        config = _resolve_layers(config)
    else:
        _refuse_ignored(config, ("layer_metric",), "all layers are compressed")
    if config.removed_ratio is not None and config.keep_ratio is not None:
        raise ConfigError(
            f"method {config.name} takes method.removed_ratio or method.keep_ratio, not both; "
            "leave one unset"
        )
    if config.keep_ratio is None:
        if config.removed_ratio is None:
            config = replace(config, removed_ratio=DEFAULT_REMOVED_RATIO)
        _check_share(config.removed_ratio)
    elif not 0 < config.keep_ratio < 1:
        raise ConfigError(
            f"method.keep_ratio must be above 0 and below 1, got {config.keep_ratio}: it is the "
            "share of the linears' parameters that is kept"
        )
    return _resolve_parts(config)


def _resolve_parts(config: MethodConfig) -> MethodConfig:
    if config.name == "grasp_plus":
        owner = "grasp" if config.preset in PRESETS else "low_rank"
        _refuse_ignored(
            config, ("preset",), "method grasp_plus is one", remedy=f"set method.name={owner}"
        )
        preset = _PLUS
    else:
        name = _checked_preset(config, tuple(WEIGHTED_PRESETS))
        preset = _PLAIN if name is None else WEIGHTED_PRESETS[name]
    config = replace(
        config,
        weighting=config.weighting or preset.weighting,
        ranks=config.ranks or preset.ranks,
        refit=config.refit or preset.refit,
    )
    if config.ranks == "uniform":
        _refuse_ignored(config, _GLOBAL_KEYS, "method.ranks is uniform")
        return _resolve_metric(config, preset.input_damping)
    if config.multiple_of is not None and config.multiple_of < 1:
        raise ConfigError(f"method.multiple_of must be at least 1, got {config.multiple_of}")
    if config.removable not in (None, "none") and config.weighting != "kfac":
        raise ConfigError(
            f"method.removable {config.removable} needs method.weighting kfac, got "
            f"{config.weighting}: prices are nats, and only its losses are"
        )
    can_narrow = Metric(weighting=config.weighting or "none").orders_channels
    if config.mlp == "channels" and not can_narrow:
        raise ConfigError(
            f"method.mlp channels needs method.weighting kfac or input_gram, got {config.weighting}"
        )
    config = replace(config, mlp=config.mlp or (preset.mlp if can_narrow else "factors"))
    return _resolve_metric(config, preset.input_damping)


def _resolve_metric(config: MethodConfig, input_damping: float) -> MethodConfig:
    used = Metric(weighting=config.weighting or "none").options
    reason = f"method.weighting is {config.weighting}"
    if "fisher" in used:
        config = replace(config, fisher=config.fisher or "sampled")
    else:
        _refuse_ignored(config, ("fisher",), reason)
    for key in _DAMPING_KEYS:
        value: float | None = getattr(config, key)
        if key not in used:
            _refuse_ignored(config, (key,), reason)
        elif value is not None and not 0 <= value <= _LARGEST_DAMPING:
            raise ConfigError(
                f"method.{key} must be from 0 to {_LARGEST_DAMPING}, got {value}: it is a share of "
                "the mean diagonal"
            )
    if config.gradient_damping is None and "gradient_damping" in used:
        config = replace(config, gradient_damping=GRADIENT_DAMPING)
    if config.input_damping is None and "input_damping" in used:
        config = replace(config, input_damping=input_damping)
    return config


def _checked_preset(config: MethodConfig, known: tuple[PresetName, ...]) -> PresetName | None:
    if config.preset is not None and config.preset not in known:
        raise ConfigError(
            f"method.preset {config.preset} does not belong to method {config.name}, which has: "
            f"{', '.join(known)}"
        )
    return config.preset


def _check_share(ratio: float | None) -> None:
    if ratio is not None and not 0 < ratio < 1:
        raise ConfigError(
            f"method.removed_ratio must be above 0 and below 1, got {ratio}: it is the share of "
            "the whole model that goes"
        )


def _check_removed_ratio(config: MethodConfig) -> None:
    ratio = config.removed_ratio
    if ratio is None:
        return
    _check_share(ratio)
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


def _refuse_ignored(
    config: MethodConfig, keys: tuple[str, ...], reason: str, *, remedy: str | None = None
) -> None:
    ignored = [f"method.{key}" for key in keys if getattr(config, key) is not None]
    if ignored:
        advice = "leave it unset" if remedy is None else f"{remedy}, or leave it unset"
        raise ConfigError(f"{', '.join(ignored)} would be ignored: {reason}; {advice}")
