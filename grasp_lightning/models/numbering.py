"""Everything in a model that depends on the numbers of its decoder layers."""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

# Names of the layer number in modules of transformers.
_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num")
# Lists of layer numbers in a config; other lists may have one entry per layer.
_NUMBER_LISTS = ("mlp_only_layers", "moe_layers")
# How many of the last layers read keys and values of earlier ones, as in Gemma 4.
_NUM_SHARING, _FIRST_SHARING = "num_kv_shared_layers", "first_kv_shared_layer_idx"
# What MiniCPM3 divides by the root of the number of layers.
_DEPTH_SCALE = "scale_depth"
# Modules beside the layers with features for each of them, as in Gemma 4: the dimension of their
# weight, and the name of its size.
_PER_LAYER_INPUTS = {
    "embed_tokens_per_layer": (1, "embedding_dim"),
    "per_layer_model_projection": (0, "out_features"),
}
# Options of a config that make layers compute with their own numbers.
_NUMBER_OPTIONS = ("scale_attn_by_inverse_layer_idx",)
# Attributes of a module that describe its use, not what it computes.
_STATES = ("training", "gradient_checkpointing")


def number_dependent_option(config: PreTrainedConfig) -> str | None:
    """Return the first option of a config that makes layers compute with their numbers, or None."""
    return next((option for option in _NUMBER_OPTIONS if getattr(config, option, False)), None)


def numbered_settings(model: nn.Module) -> dict[str, bool | int | float | str]:
    """Return ``<module>.<attribute>`` -> value for plain attributes of modules with a layer number.

    They may depend on that number, as a sliding window in some layers does, so they show whether
    layers match their numbers.
    """
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if any(hasattr(module, number) for number in _NUMBER_NAMES)
        for key, value in _plain(module).items()
    }


def unnumbered_settings(module: nn.Module) -> dict[str, bool | int | float | str]:
    """Return the plain attributes of a module, except the number of its layer."""
    return {key: value for key, value in _plain(module).items() if key not in _NUMBER_NAMES}


def _plain(module: nn.Module) -> dict[str, bool | int | float | str]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key not in _STATES
    }


def renumber_layer(layer: nn.Module, old: int, new: int) -> None:
    """Replace a layer's old number in its modules; other numbers mean something else."""
    for module in layer.modules():
        for name in _NUMBER_NAMES:
            if getattr(module, name, None) == old:
                setattr(module, name, new)


def shorten_decoder(
    decoder: nn.Module, config: PreTrainedConfig, num_layers: int, kept: Sequence[int]
) -> None:
    """Update what a decoder holds beside its layers for each of them, after layers are removed.

    Args:
        decoder: The module with the list of layers.
        config: Its shortened config.
        num_layers: How many layers there were.
        kept: Numbers of those that remain.
    """
    if hasattr(decoder, _FIRST_SHARING):
        first = config.num_hidden_layers - getattr(config, _NUM_SHARING)
        setattr(decoder, _FIRST_SHARING, first)
    for name, (dim, size_name) in _PER_LAYER_INPUTS.items():
        module: Any = getattr(decoder, name, None)  # Any: attributes of modules have no type
        if module is None:
            continue
        weight = module.weight.detach()
        parts = weight.unflatten(dim, (num_layers, -1))
        chosen = torch.tensor(kept, dtype=torch.int64, device=weight.device)
        new = parts.index_select(dim, chosen).flatten(dim, dim + 1)
        module.weight = nn.Parameter(new, requires_grad=module.weight.requires_grad)
        setattr(module, size_name, new.shape[dim])


def shorten_config(config: PreTrainedConfig, positions: AbstractSet[int]) -> None:
    """Remove layers from a config in place, by their present numbers.

    This changes the numbers of layers, lists with an entry per layer, and lists of layer numbers.
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
    shared = getattr(config, _NUM_SHARING, None)
    if shared:
        setattr(config, _NUM_SHARING, sum(position >= num_layers - shared for position in kept))
    if getattr(config, _DEPTH_SCALE, None) is not None:
        scale = getattr(config, _DEPTH_SCALE) * math.sqrt(len(kept) / num_layers)
        setattr(config, _DEPTH_SCALE, scale)
    config.num_hidden_layers = len(kept)
    # Values of single layers that override the common ones, as in Gemma 4.
    own = config.to_dict().get("per_layer_config")
    if own is not None:
        values = {int(number): value for number, value in own.items()}
        config.per_layer_config = {
            new: values[position] for new, position in enumerate(kept) if position in values
        }
