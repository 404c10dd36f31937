"""Completion of user options: presets, defaults, and keys without effect."""

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from grasp_lightning.config import MethodConfig, PresetName
from grasp_lightning.errors import ConfigError

T = TypeVar("T")


def keys_of(options: type[Any]) -> tuple[str, ...]:  # Any: a dataclass has no type of its own
    """Return the keys of an options class."""
    return tuple(field.name for field in fields(options))


def given(config: MethodConfig, options: type[Any]) -> dict[str, Any]:  # Any: values of all types
    """Return the keys of an options class that are set, as arguments."""
    values = {key: getattr(config, key) for key in keys_of(options)}
    return {key: value for key, value in values.items() if value is not None}


def filled(config: MethodConfig, defaults: object, unused: Collection[str] = ()) -> MethodConfig:
    """Return options with defaults for unset keys, except for the unused ones."""
    wanted = {key: value for key, value in vars(defaults).items() if key not in unused}
    return replace(config, **{k: v for k, v in wanted.items() if getattr(config, k) is None})


def refuse_ignored(
    config: MethodConfig, keys: Collection[str], reason: str, remedy: str | None = None
) -> None:
    """Refuse keys that would have no effect.

    Args:
        config: The user's options.
        keys: Keys without effect.
        reason: Why they have no effect.
        remedy: An alternative to leaving them unset.

    Raises:
        ConfigError: If one of them is set.
    """
    is_set = (key for key, value in vars(config).items() if key in keys and value is not None)
    if ignored := [f"method.{key}" for key in is_set]:
        advice = "leave it unset" if remedy is None else f"{remedy}, or leave it unset"
        raise ConfigError(f"{', '.join(ignored)} would be ignored: {reason}; {advice}")


def chosen_preset(config: MethodConfig, known: Mapping[PresetName, T], default: T) -> T:
    """Return the known options of the configured preset, or the default without one.

    Raises:
        ConfigError: If the preset belongs to another method.
    """
    if config.preset is None:
        return default
    if config.preset not in known:
        raise ConfigError(
            f"method.preset {config.preset} does not belong to method {config.name}, which has: "
            f"{', '.join(known)}"
        )
    return known[config.preset]


def check_share(ratio: float | None) -> None:
    """Refuse a ``removed_ratio`` outside (0, 1)."""
    if ratio is not None and not 0 < ratio < 1:
        raise ConfigError(
            f"method.removed_ratio must be above 0 and below 1, got {ratio}: it is the share of "
            "the whole model to remove"
        )


def named_layers(config: MethodConfig) -> str | None:
    """Return the key that sets the layers or their number; None if neither is set."""
    if config.layers is not None:
        return "method.layers"
    return None if config.num_layers is None else "method.num_layers"


def resolve_layers(config: MethodConfig) -> MethodConfig:
    """Return options with sorted layers, or with the metric that finds them.

    Raises:
        ConfigError: If the layers or their number are missing, ambiguous or out of range.
    """
    if config.removed_ratio is not None and named_layers(config) is None:
        return replace(config, layer_metric=config.layer_metric or "similarity")
    if (config.layers is None) == (config.num_layers is None):
        both = "both are set" if config.layers is not None else "neither is set"
        raise ConfigError(f"set exactly one of method.num_layers and method.layers ({both})")
    if config.layers is not None:
        refuse_ignored(config, ("layer_metric",), "method.layers is explicit")
        return replace(config, layers=_checked_layers(config.layers))
    if config.num_layers is not None and config.num_layers < 1:
        raise ConfigError(f"method.num_layers must be at least 1, got {config.num_layers}")
    return replace(config, layer_metric=config.layer_metric or "similarity")


def resolve_deletion(config: MethodConfig) -> MethodConfig:
    """Return the options of a method that deletes layers: a share, a number, or the layers.

    Raises:
        ConfigError: If two of them are set, none is, or one is out of range.
    """
    check_share(config.removed_ratio)
    key = named_layers(config)
    if config.removed_ratio is not None and key is not None:
        raise ConfigError(
            f"method {config.name} takes method.removed_ratio or {key}, not both; leave one unset"
        )
    return resolve_layers(config)


def resolve_number(config: MethodConfig) -> MethodConfig:
    """Return the options of a method that finds the layers to delete by a rule of its own.

    Raises:
        ConfigError: If share and number are both set, neither is, or one is out of range.
    """
    if config.num_layers is None and config.removed_ratio is None:
        raise ConfigError(
            f"method {config.name} needs method.removed_ratio or method.num_layers; neither is set"
        )
    return replace(resolve_deletion(config), layer_metric=None)


def check_protected(config: MethodConfig) -> None:
    """Refuse a negative number of protected layers."""
    for key in ("protect_first", "protect_last"):
        value = getattr(config, key)
        if value is not None and value < 0:
            raise ConfigError(f"method.{key} is a number of layers and cannot be negative: {value}")


def resolve_share(config: MethodConfig) -> MethodConfig:
    """Return the options of a method that makes layers smaller until a share is removed.

    Raises:
        ConfigError: If the share is missing or out of range, or a number of layers is set.
    """
    refuse_ignored(
        config, ("num_layers",), f"method {config.name} makes layers smaller and deletes none"
    )
    if config.removed_ratio is None:
        raise ConfigError(f"method {config.name} needs method.removed_ratio, which is not set")
    check_share(config.removed_ratio)
    return config


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
