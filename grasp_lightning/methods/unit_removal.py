"""Removal of units: key/value groups of attention and hidden channels of MLPs."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import as_linear
from grasp_lightning.models.operations.base import dense_module
from grasp_lightning.models.sharding import whole
from grasp_lightning.models.units import Units, channel_units, head_units, heads_problem
from grasp_lightning.plan import NarrowMlp, RemoveHeads

SPREAD: Final = "spread"
"""Name of a step that measures mean and variance of inputs."""
_KEY = "{reader}.units"


def removable_units(view: DecoderView, layers: Sequence[int], method: str) -> tuple[Units, ...]:
    """Return the key/value groups and then the channels of each layer, in model order.

    The weights may be on the meta device.

    Args:
        method: Name of the method, for messages.

    Raises:
        ModelError: If heads or channels of one of the layers cannot be removed.
    """
    found: list[Units] = []
    for index in layers:
        heads, channels = head_units(view, index), channel_units(view, index)
        if heads is None:
            raise ModelError(f"method {method}: {heads_problem(view, index)}")
        if channels is None:
            raise ModelError(
                f"method {method}: the MLP of decoder layer {index} of "
                f"{type(view.model).__name__} has no hidden channels that can be removed one by one"
            )
        found += [heads, channels]
    return tuple(found)


def unit_operation(units: Units, kept: Collection[int]) -> NarrowMlp | RemoveHeads:
    """Return the operation that keeps some units of a block and removes the others."""
    chosen = tuple(sorted(kept))
    if units.are_heads:
        return RemoveHeads(
            output=units.reader, inputs=units.writers, groups=chosen, num_groups=units.number
        )
    return NarrowMlp(reader=units.reader, writers=units.writers, channels=chosen)


def unit_tensors(view: DecoderView, units: Units, kept: Collection[int]) -> dict[str, Tensor]:
    """Return the tensors of ``unit_operation``: for an MLP, the kept columns of the reader."""
    if units.are_heads:
        return {}
    columns = reader_weight(view, units)[:, units.columns(sorted(kept))]
    return {f"{units.reader}.weight": columns.contiguous()}


def reader_weight(view: DecoderView, units: Units) -> Tensor:
    """Return the whole weight of the linear that reads units, ``(N, M)``, on the CPU."""
    return whole(as_linear(dense_module(view, units.reader)).weight.detach()).cpu()


def stored_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of units by their storage names, given by the reader of their block."""
    return {_KEY.format(reader=reader): value.float() for reader, value in scores.items()}


def in_order(scores: Tensor) -> list[int]:
    """Return units from the lowest score on; ties go to the lower number."""
    order: list[int] = torch.sort(scores, stable=True).indices.tolist()
    return order


def size_to_remove(ratio: float, dense: int, most: int, advice: str = "") -> int:
    """Return how many parameters a share of the whole model is.

    Args:
        ratio: The share.
        dense: Parameters of the whole model.
        most: Parameters that can be removed.
        advice: How to remove more, as the rest of a sentence.

    Raises:
        ConfigError: If they are too many, or none.
    """
    size = round(ratio * dense)
    if size > most:
        high = math.floor(1e4 * most / dense) / 1e4
        raise ConfigError(
            f"method.removed_ratio {ratio} is out of reach: the feasible range is above 0 to "
            f"{high:.4f}, with one key/value group and one channel left in each layer; lower "
            f"it{advice}"
        )
    if size == 0:
        raise ConfigError(
            f"method.removed_ratio {ratio} removes less than one parameter: nothing would be "
            "removed"
        )
    return size
