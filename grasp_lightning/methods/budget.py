"""From a share of the whole model to a number of layers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.blocks import factorize_operations
from grasp_lightning.methods.rank_rules import UniformRanks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, Operation


def resolve_num_layers(config: MethodConfig, view: DecoderView) -> MethodConfig:
    """Return the options with the number of layers that a removed ratio needs.

    Replacement takes the fewest layers that reach the target at ``keep_ratio``, for any choice of
    layers; deletion takes the number that comes nearest.

    Args:
        config: Options as ``resolve_method`` returns them.
        view: The dense model; its weights may be on the meta device.

    Returns:
        The options, with ``num_layers`` set unless layers are given already.

    Raises:
        ConfigError: If the target is out of reach, naming the feasible range.
    """
    if config.layers is not None or config.num_layers is not None:
        return config
    if config.removed_ratio is None:
        return config
    keep_ratio = config.keep_ratio or 0.0
    if view.num_layers == 1 and not keep_ratio:
        raise ConfigError("method.removed_ratio: the model has one decoder layer, none can go")
    dense = count_parameters(view.model)
    saved = sorted(
        dense - parameters_after(view, layer_operations(view, index, keep_ratio))
        for index in view.layer_indices
    )
    find = _fewest if keep_ratio else _nearest
    count = find(config, dense, tuple(accumulate(saved)))
    return replace(config, num_layers=count, layer_metric=config.layer_metric or "similarity")


def layer_operations(view: DecoderView, index: int, keep_ratio: float) -> tuple[Operation, ...]:
    """Return what happens to one layer at a uniform keep ratio; no components are chosen.

    Args:
        view: The dense model.
        index: Number of the layer.
        keep_ratio: Share of each matrix's parameters that is kept; 0 deletes the layer.

    Returns:
        The operations.
    """
    if not keep_ratio:
        return (DropLayers(layers=(index,)),)
    return factorize_operations(view, (index,), UniformRanks(keep_ratio=keep_ratio))


def _fewest(config: MethodConfig, dense: int, totals: Sequence[int]) -> int:
    """Return the smallest number of layers that save enough.

    Args:
        config: The options.
        dense: Parameters of the whole model.
        totals: Parameters that 1, 2, ... layers save.

    Returns:
        The number.

    Raises:
        ConfigError: If all layers save too little.
    """
    # In whole parameters, so that a share that a run has reported can be asked for again.
    target = round((config.removed_ratio or 0.0) * dense)
    count = next((n for n, total in enumerate(totals, 1) if total >= target), None)
    if count is None:
        raise ConfigError(
            f"method.removed_ratio {config.removed_ratio} is out of reach at method.keep_ratio "
            f"{config.keep_ratio}: the feasible range is 0 to "
            f"{math.floor(1e4 * totals[-1] / dense) / 1e4:.4f}, which all {len(totals)} layers give"
        )
    return count


def _nearest(config: MethodConfig, dense: int, totals: Sequence[int]) -> int:
    """Return the number of layers that save nearest to the target.

    Args:
        config: The options.
        dense: Parameters of the whole model.
        totals: Parameters that 1, 2, ... layers save.

    Returns:
        The number.

    Raises:
        ConfigError: If that is no layer, or all of them.
    """
    target = (config.removed_ratio or 0.0) * dense
    choices = (0, *totals)
    count = min(range(len(choices)), key=lambda n: abs(choices[n] - target))
    if not 0 < count < len(totals):
        raise ConfigError(
            f"method.removed_ratio {config.removed_ratio} is out of reach: the feasible range is "
            f"{totals[0] / dense:.4f} to {totals[-2] / dense:.4f}, from 1 to {len(totals) - 1} "
            "layers deleted"
        )
    return count
