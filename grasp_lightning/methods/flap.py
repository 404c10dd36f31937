"""FLAP: remove the heads and channels whose inputs vary least, and add their mean as a bias."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from grasp_lightning.config import AmountOptions, MethodConfig
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.options import resolve_share
from grasp_lightning.methods.prediction import Prediction, predict_units
from grasp_lightning.methods.unit_removal import (
    SPREAD,
    in_order,
    reader_weight,
    removable_units,
    size_to_remove,
    stored_scores,
    unit_operation,
    unit_tensors,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations.base import dense_module
from grasp_lightning.models.sharding import whole
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.units import Units
from grasp_lightning.plan import AddBias, Operation, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Spread, Statistics, Step

NAME: Final = "flap"


class Block(NamedTuple):
    """The units of an attention or MLP, and what a bias of their reader costs.

    Attributes:
        added: Parameters of the bias; 0 if the reader has one.
    """

    units: Units
    added: int


class Flap(CompressionMethod):
    """Remove key/value groups and MLP channels by one threshold over all layers.

    For an input j of the linear that reads heads or channels, with weight W and variance ``v_j``
    over the tokens of the text, the fluctuation is ``v_j |W_j|^2``. Within the attention, or
    the MLP, of each layer, the values of all inputs are shifted and scaled to mean 0 and deviation
    1.
    The score of a unit is the mean over its inputs. The units with the lowest scores of the whole
    model are removed until the share is reached; the best one of each block stays. What the removed
    inputs contribute on average, ``sum_j mean_j W_j``, becomes a bias of the linear.

    Source: An et al., "Fluctuation-based Adaptive Structured Pruning", arXiv:2312.11983. As in its
    public code, fluctuations of attention are squared before they are standardised, which the
    formula does not do. Differences: the public code changes the running mean in place before it
    compares with the old one, so its sum of squares is not that of Welford's algorithm, and its
    first window counts as 0; here variances come from float64 sums over all tokens. It prices a
    head at 512/3 channels, and no bias; here units and biases cost their parameters. Its ratio is a
    share of the linears, here it is one of all parameters. A unit is a
    key/value group with the query heads that read it.

    Args:
        removed_ratio: Share of all parameters to remove, biases counted.
    """

    name = NAME
    reference = "https://arxiv.org/abs/2312.11983"

    def __init__(self, removed_ratio: float) -> None:
        self._ratio = removed_ratio

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The share."""
        return {"removed_ratio": self._ratio}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the step that measures the inputs, once."""
        if plan.operations:
            return None
        readers = (units.reader for units in removable_units(model, model.layer_indices, NAME))
        return Step(name=SPREAD, needs=Needs(spreads=tuple(readers)))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Remove units below the threshold, and add the biases."""
        del step
        blocks = removable_blocks(model)
        scores = {
            units.reader: fluctuation(
                units, reader_weight(model, units), stats.spreads[units.reader]
            )
            for units, _ in blocks
        }
        gone = units_to_remove(blocks, scores, self._target(model))
        operations: list[Operation] = []
        tensors: dict[str, Tensor] = {}
        for units, _ in blocks:
            if removed := gone[units.reader]:
                kept = [unit for unit in range(units.number) if unit not in removed]
                operations += [unit_operation(units, kept), AddBias(module=units.reader)]
                tensors |= unit_tensors(model, units, kept)
                mean = stats.spreads[units.reader].mean
                tensors[f"{units.reader}.bias"] = compensation(model, units, removed, mean)
        return Decision(operations=tuple(operations), tensors=tensors, scores=stored_scores(scores))

    def predict(self, view: DecoderView) -> Prediction:
        """Return the size that the share leaves; the data decides on heads and widths."""
        blocks = removable_blocks(view)
        target = self._target(view)
        share = target / sum(units.size * units.number for units, _ in blocks)
        operations: list[Operation] = []
        for units, _ in blocks:
            kept = range(max(units.number - round(share * units.number), 1))
            if len(kept) < units.number:
                operations += [unit_operation(units, kept), AddBias(module=units.reader)]
        size = count_parameters(view.model) - target
        return predict_units(view, view.layer_indices, tuple(operations), size=size)

    def _target(self, view: DecoderView) -> int:
        return round(self._ratio * count_parameters(view.model))


def removable_blocks(view: DecoderView) -> list[Block]:
    """Return attention and MLP of each layer; the weights may be on the meta device."""
    linears = view.all_linears()
    return [
        Block(x, linears[x.reader].out_features * (linears[x.reader].bias is None))
        for x in removable_units(view, view.layer_indices, NAME)
    ]


def fluctuation(units: Units, weight: Tensor, spread: Spread) -> Tensor:
    """Return the score of each unit of a block, float64, ``(U,)``.

    Args:
        weight: Of the linear that reads the units, ``(N, M)``.
        spread: Of its inputs.
    """
    scores = spread.variance * weight.double().square().sum(dim=0)
    if units.are_heads:
        scores = scores.square()
    deviation = scores.std() if len(scores) > 1 else torch.zeros(())
    standard = (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)
    return standard.reshape(units.number, units.width).mean(dim=1)


def units_to_remove(
    blocks: Sequence[Block], scores: Mapping[str, Tensor], target: int
) -> dict[str, set[int]]:
    """Return the units to remove by the reader of their block.

    Units go from the lowest score on until at least ``target`` parameters are removed. Those that
    are not needed for it then return, from the highest score on.

    Args:
        scores: Score of each unit, ``(U,)``, by reader.
        target: At most what ``most_removed`` returns.
    """
    by_reader = {block.units.reader: block for block in blocks}
    candidates = [
        (float(scores[reader][unit]), position, reader, unit)
        for position, reader in enumerate(by_reader)
        for unit in in_order(scores[reader])[:-1]
    ]
    gone: dict[str, set[int]] = {reader: set() for reader in by_reader}
    left, order = target, []
    for _, _, reader, unit in sorted(candidates):
        if left <= 0:
            break
        left -= by_reader[reader].units.size - by_reader[reader].added * (not gone[reader])
        gone[reader].add(unit)
        order.append((reader, unit))
    for reader, unit in reversed(order):
        returned = by_reader[reader].units.size - by_reader[reader].added * (len(gone[reader]) == 1)
        if left + returned <= 0:
            left += returned
            gone[reader].remove(unit)
    return gone


def most_removed(blocks: Iterable[Block]) -> int:
    """Return how many parameters go if one unit of each block stays."""
    return sum(
        units.size * (units.number - 1) - added for units, added in blocks if units.number > 1
    )


def compensation(view: DecoderView, units: Units, removed: Iterable[int], mean: Tensor) -> Tensor:
    """Return the bias of a reader without some units: its bias plus their mean contribution.

    Args:
        mean: Mean of its inputs, ``(M,)``, float64.

    Returns:
        ``(N,)``, float32 or better.
    """
    columns, weight = units.columns(sorted(removed)), reader_weight(view, units)
    added = weight[:, columns].double() @ mean[columns]
    bias = dense_module(view, units.reader).bias
    if bias is not None:
        added = added + whole(bias.detach()).cpu().double()
    return added.to(torch.promote_types(weight.dtype, torch.float32))


def _built(config: MethodConfig, view: DecoderView, track: Track) -> Flap:
    del track
    ratio, dense = config.removed_ratio, count_parameters(view.model)
    assert ratio is not None  # complete options
    size_to_remove(ratio, dense, most_removed(removable_blocks(view)))
    return Flap(ratio)


FLAP: Final = Registered(
    name=NAME,
    options=AmountOptions,
    ignores="removes heads and channels whose inputs vary least",
    resolve=resolve_share,
    build=_built,
)
