"""From a share of the whole model to a number of layers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.rank_rules import UniformRanks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, FactorizeLinear, Operation


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
    if config.removed_ratio is None or config.layers is not None or config.num_layers is not None:
        return config
    dense = count_parameters(view.model)
    saved = sorted(
        dense - parameters_after(view, layer_operations(view, index, config.keep_ratio or 0.0))
        for index in view.layer_indices
    )
    shares = [total / dense for total in accumulate(saved)]
    if config.keep_ratio:
        count = next((n for n, s in enumerate(shares, 1) if s >= config.removed_ratio), None)
        if count is None:
            raise ConfigError(
                f"method.removed_ratio {config.removed_ratio} is out of reach at keep_ratio "
                f"{config.keep_ratio}: all {len(shares)} layers give {shares[-1]:.4f}; the "
                f"feasible range is 0 to {shares[-1]:.4f}"
            )
    else:
        count = _nearest(shares[:-1], config.removed_ratio)  # one layer must be left
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
    shapes = {n: (m.out_features, m.in_features) for n, m in view.linears(index).items()}
    ranks = UniformRanks(keep_ratio=keep_ratio).ranks(shapes)
    return tuple(FactorizeLinear(module=n, rank=r, components=None) for n, r in ranks.items())


def _nearest(shares: Sequence[float], target: float) -> int:
    if not shares:
        raise ConfigError("method.removed_ratio: the model has one decoder layer, none can go")
    return min(range(len(shares)), key=lambda n: abs(shares[n] - target)) + 1
