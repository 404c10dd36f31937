"""The number of layers that a removed share of the whole model requires."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.blocks import factorize_operations
from grasp_lightning.methods.options import named_layers
from grasp_lightning.methods.rank_rules import UniformRanks
from grasp_lightning.methods.seams import seam_size
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, Operation


def resolve_num_layers(
    config: MethodConfig,
    view: DecoderView,
    *,
    candidates: Iterable[int] | None = None,
    also: int = 0,
) -> MethodConfig:
    """Return the options with the number of layers that ``removed_ratio`` requires.

    Replacement takes the fewest layers that reach the target at ``keep_ratio`` for any choice of
    layers; deletion takes the nearest number, counting one seam if there are seams. Explicit layers
    or numbers stay unchanged.

    Args:
        config: Options with a method's defaults.
        view: The dense model.
        candidates: The layers that may be chosen; None for all.
        also: Parameters that deletion removes outside of the deleted layers.

    Raises:
        ConfigError: If the target is out of reach, with the feasible range.
    """
    if named_layers(config) is not None or config.removed_ratio is None:
        return config
    keep_ratio = config.keep_ratio or 0.0
    if view.num_layers == 1 and not keep_ratio:
        raise ConfigError(
            "method.removed_ratio: the model has only one decoder layer, so none can be removed"
        )
    dense = count_parameters(view.model)
    saved = sorted(
        dense - parameters_after(view, _layer_operations(view, index, keep_ratio))
        for index in (view.layer_indices if candidates is None else candidates)
    )
    if keep_ratio:
        count = _fewest(config, dense, tuple(accumulate(saved)))
    else:
        if candidates is not None and len(saved) < view.num_layers:
            saved.append(saved[-1])  # another layer remains, so all candidates may be deleted
        # The number of runs of deleted layers is not known yet: at least one has a seam.
        added = seam_size(view) if config.seam == "linear" else 0
        count = nearest_number(config, dense, saved, "layers", also=also - added)
    return replace(config, num_layers=count, layer_metric=config.layer_metric or "similarity")


def _layer_operations(view: DecoderView, index: int, keep_ratio: float) -> tuple[Operation, ...]:
    """Compress one layer at a uniform keep ratio, or delete it if that is 0."""
    if not keep_ratio:
        return (DropLayers(layers=(index,)),)
    return factorize_operations(view, (index,), UniformRanks(keep_ratio=keep_ratio))


def _fewest(config: MethodConfig, dense: int, totals: Sequence[int]) -> int:
    """Return the smallest number of layers that save enough; n layers save ``totals[n - 1]``."""
    # Rounded to whole parameters, so that the share reported by a run can be requested again.
    target = round((config.removed_ratio or 0.0) * dense)
    count = next((n for n, total in enumerate(totals, 1) if total >= target), None)
    if count is None:
        raise ConfigError(
            f"method.removed_ratio {config.removed_ratio} is out of reach at method.keep_ratio "
            f"{config.keep_ratio}: the feasible range is 0 to "
            f"{math.floor(1e4 * totals[-1] / dense) / 1e4:.4f}, the latter with all {len(totals)} "
            "layers"
        )
    return count


def nearest_number(
    config: MethodConfig, dense: int, saved: Iterable[int], noun: str, *, also: int = 0
) -> int:
    """Return the number of parts whose deletion comes nearest to ``removed_ratio``.

    Args:
        dense: Parameters of the whole model.
        saved: Parameters that the deletion of each part saves.
        noun: What the parts are, for the message.
        also: Parameters that any deletion removes outside of the parts.

    Raises:
        ConfigError: If none or all of them come nearest, with the feasible range.
    """
    totals = [total + also for total in accumulate(sorted(saved))]
    if len(totals) == 1:
        raise ConfigError(f"method.removed_ratio: the model has only one of the {noun}; it stays")
    target = (config.removed_ratio or 0.0) * dense
    choices = (0, *totals)
    count = min(range(len(choices)), key=lambda n: abs(choices[n] - target))
    if not 0 < count < len(totals):
        raise ConfigError(
            f"method.removed_ratio {config.removed_ratio} is out of reach: the feasible range is "
            f"{totals[0] / dense:.4f} to {totals[-2] / dense:.4f}, from 1 to {len(totals) - 1} "
            f"{noun} deleted"
        )
    return count
