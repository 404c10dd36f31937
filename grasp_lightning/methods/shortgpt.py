"""ShortGPT: delete the layers of lowest block influence."""

from dataclasses import replace
from typing import Final

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.base import Registered, Track, no_obstacle
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.options import refuse_ignored, resolve_number
from grasp_lightning.models.decoder import DecoderView


class ShortGpt(DropMethod):
    """Delete the decoder layers of lowest block influence, in one shot.

    The block influence of layer i is ``BI_i = 1 - E[X_i . X_{i+1} / (|X_i| |X_{i+1}|)]``, where
    ``X_i`` are the hidden states of a token that enter the layer, and ``X_{i+1}`` those that leave
    it. ``drop`` with ``layer_metric: similarity`` has the same order, so both delete the same
    layers.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, definition of Block Influence. The public code
    sums over tokens instead of averaging, which leaves the order. It reads the state after the last
    layer behind the final norm, which changes the influence of this layer only.

    Args:
        num_layers: Number of layers to delete.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(LayerChoice(num_layers=num_layers), "shortgpt")


def _resolved(config: MethodConfig) -> MethodConfig:
    refuse_ignored(config, ("layers",), "shortgpt chooses the layers", "set method.name=drop")
    if config.layer_metric == "angular":
        raise ConfigError(
            "method shortgpt measures method.layer_metric similarity, got angular; set "
            "method.name=drop, or leave it unset"
        )
    resolved = resolve_number(replace(config, layer_metric=None))
    return replace(resolved, layer_metric="similarity")


def _built(config: MethodConfig, view: DecoderView, track: Track) -> ShortGpt:
    del track
    return ShortGpt(resolve_num_layers(config, view).num_layers or 0)


SHORTGPT: Final = Registered(
    name="shortgpt",
    ignores="deletes layers and scores no components",
    resolve=_resolved,
    build=_built,
    obstacle=no_obstacle,
)
