"""What in a model depends on the numbers of its decoder layers, and must follow when some go."""

from collections.abc import Set as AbstractSet

from torch import nn
from transformers import PreTrainedConfig

# What transformers' modules call the number of the layer they are in.
_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num")
# Lists of layer numbers in a config; other lists may have one entry per layer.
_NUMBER_LISTS = ("mlp_only_layers", "moe_layers")
# Options of a config that make layers compute with their own numbers.
_NUMBER_OPTIONS = ("scale_attn_by_inverse_layer_idx",)
# Attributes of a module that say how it is used, not what it computes.
_STATES = ("training", "gradient_checkpointing")


def number_dependent_option(config: PreTrainedConfig) -> str | None:
    """Return the option that makes layers compute with their numbers, or None.

    Args:
        config: The config of a model.

    Returns:
        The first such option that is on; such layers change when they are renumbered.
    """
    return next((option for option in _NUMBER_OPTIONS if getattr(config, option, False)), None)


def numbered_settings(model: nn.Module) -> dict[str, bool | int | float | str]:
    """Return the plain attributes of all modules that know their layer number.

    They may follow from that number, as which layers have a sliding window does, so they tell
    whether layers are under numbers that suit them.

    Args:
        model: Any model.

    Returns:
        ``<module>.<attribute>`` -> value.
    """
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if any(hasattr(module, number) for number in _NUMBER_NAMES)
        for key, value in _plain(module).items()
    }


def unnumbered_settings(module: nn.Module) -> dict[str, bool | int | float | str]:
    """Return the plain attributes of a module, without the number of the layer that it is in."""
    return {key: value for key, value in _plain(module).items() if key not in _NUMBER_NAMES}


def _plain(module: nn.Module) -> dict[str, bool | int | float | str]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key not in _STATES
    }


def renumber_layer(layer: nn.Module, old: int, new: int) -> None:
    """Give all modules of one decoder layer another layer number.

    Args:
        layer: The layer.
        old: Its number so far; a module that holds another one counts otherwise, and keeps it.
        new: Its number from now on.
    """
    for module in layer.modules():
        for name in _NUMBER_NAMES:
            if getattr(module, name, None) == old:
                setattr(module, name, new)


def shorten_config(config: PreTrainedConfig, positions: AbstractSet[int]) -> None:
    """Take layers out of a config: their number, entries per layer, and lists of layer numbers.

    Args:
        config: Changed in place.
        positions: Present numbers of the layers that go.
    """
    num_layers = config.num_hidden_layers
    kept = [position for position in range(num_layers) if position not in positions]
    for key, value in list(vars(config).items()):
        if not isinstance(value, list | tuple):
            continue
        # Lists of token ids and class names can have that length by chance.
        per_layer = not key.endswith("_token_id") and key != "architectures"
        if key in _NUMBER_LISTS:
            setattr(config, key, type(value)(kept.index(n) for n in value if n in kept))
        elif per_layer and len(value) == num_layers:
            setattr(config, key, type(value)(value[position] for position in kept))
    config.num_hidden_layers = len(kept)
    # What single layers have in place of the common values, as in Gemma 4.
    own = config.to_dict().get("per_layer_config")
    if own is not None:
        values = {int(number): value for number, value in own.items()}
        config.per_layer_config = {
            new: values[position] for new, position in enumerate(kept) if position in values
        }
