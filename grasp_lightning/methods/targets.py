"""What each server can run: which parts may be cut for it, and how."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, get_args

import torch
from torch import Tensor

from grasp_lightning.config import MethodConfig, TargetChoice
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.narrowing import Narrowable
from grasp_lightning.methods.options import named_layers
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.plain import make_plain
from grasp_lightning.models.rebuilding import rebuilt_empty
from grasp_lightning.models.surgery import apply_operations

TARGETS: Final[tuple[TargetChoice, ...]] = get_args(TargetChoice)
MULTIPLES: Final[Mapping[TargetChoice, int]] = MappingProxyType(
    # Blocks of llama.cpp's types hold 32 weights of a row.
    {"any": 1, "no_factors": 1, "gguf": 32, "plain": 32}
)
"""Numbers whose multiples ranks and widths are, where the user has set none."""

_KEY = "{target}.target_loss"


def check_target(config: MethodConfig, metric: Metric) -> None:
    """Refuse keys that contradict ``method.target``, which cuts MLP channels alone.

    Raises:
        ConfigError: If there are any.
    """
    target = f"method.target {config.target}"
    if config.target in (None, "any"):
        return
    if config.mlp == "factors":
        raise ConfigError(
            f"{target} removes channels of MLPs alone, so it needs method.mlp=channels, got "
            "factors; set method.target=any to factorize"
        )
    if not metric.orders_channels:
        raise ConfigError(
            f"{target} removes channels of MLPs alone, which needs method.weighting kfac or "
            f"input_gram, got {metric.weighting}"
        )
    if config.target != "plain":
        return
    if key := named_layers(config):
        raise ConfigError(
            f"{target} gives all layers one width, so {key} cannot choose some of them; leave "
            "it unset, or set method.target=gguf"
        )
    if config.removable == "layers_and_blocks":
        raise ConfigError(
            f"{target} can remove whole layers but no blocks, since all layers need one shape; set "
            "method.removable=layers, or method.target=gguf"
        )


def mlps_for(
    target: TargetChoice, view: DecoderView, mlps: Mapping[str, Narrowable], *, loses_experts: bool
) -> dict[str, Narrowable]:
    """Return the MLPs and experts that can be cut for a target.

    If an ordinary folder cannot have another width, but mixtures can lose experts, those keep their
    width.

    Args:
        target: The target.
        view: The dense model; its weights may be on the meta device.
        mlps: Its MLPs with removable channels.
        loses_experts: Whether experts can be removed from all of its mixtures.

    Raises:
        ConfigError: If the model cannot be cut.
    """
    problem = None if target == "any" else _problem(target, view, mlps)
    if problem is None:
        return dict(mlps)
    if target == "plain" and loses_experts:
        return {n: replace(mlp, has_width=True) for n, mlp in mlps.items() if mlp.num_experts}
    raise ConfigError(f"method.target {target}: {type(view.model).__name__} {problem}")


def _problem(target: TargetChoice, view: DecoderView, mlps: Mapping[str, Narrowable]) -> str | None:
    if not mlps:
        return "has no MLP whose channels can be removed; use method.target=any"
    if target != "plain":
        has_experts = target == "gguf" and any(mlp.num_experts for mlp in mlps.values())
        others = "use method.target=plain, no_factors or any"
        return f"has experts, which format gguf does not write; {others}" if has_experts else None
    others = "use method.target=gguf, no_factors or any"
    missing = set(view.layer_indices) - {view.layer_of(reader) for reader in mlps}
    if missing:
        return f"has no MLP whose channels can be removed in layer {min(missing)}; {others}"
    sizes = sorted({mlp.num_channels for mlp in mlps.values()})
    if len(sizes) > 1:
        return f"has MLPs of different widths, {sizes[0]} to {sizes[-1]} channels; {others}"
    if not _can_say_width(view, mlps.values()):
        return f"has a config without a key for the width of its MLPs; {others}"
    return None


def stored_target_losses(losses: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the predicted losses of targets by their storage names."""
    return {_KEY.format(target=target): torch.tensor([loss]) for target, loss in losses.items()}


def read_target_losses(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the stored predicted loss of each target, in nats per token."""
    keys = {target: _KEY.format(target=target) for target in TARGETS}
    return {target: float(scores[key]) for target, key in keys.items() if key in scores}


def _can_say_width(view: DecoderView, mlps: Collection[Narrowable]) -> bool:
    """Return whether a model with narrower MLPs would be an ordinary one, by trying it."""
    trial = rebuilt_empty(view.model)
    kept = [torch.arange(mlp.multiple_of) for mlp in mlps]
    cut = [mlp.operation(channels) for mlp, channels in zip(mlps, kept, strict=True)]
    empty = {mlp.solved_tensor: torch.zeros(1).expand(_solved_shape(mlp)) for mlp in mlps}
    apply_operations(DecoderView(trial), cut, empty)
    return make_plain(trial)


def _solved_shape(mlp: Narrowable) -> tuple[int, ...]:
    """Return the shape of the refitted weight with the smallest number of channels."""
    if mlp.num_experts:
        return mlp.num_experts, mlp.num_outputs // mlp.num_experts, mlp.multiple_of
    return mlp.num_outputs, mlp.multiple_of
