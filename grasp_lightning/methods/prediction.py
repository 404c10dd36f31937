"""Predicted sizes of a compressed model, from shapes alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from grasp_lightning.config import TargetChoice
from grasp_lightning.linalg.ranks import factor_parameters
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import (
    MergeLayers,
    NarrowExperts,
    NarrowMlp,
    Operation,
    Plan,
    RemoveBlock,
    SparsifyLinear,
)

Layers = tuple[int, ...]
"""Numbers of decoder layers in the original model, ascending."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Sizes before and after, without data.

    Attributes:
        dense: Parameters of the model, tied ones counted once.
        most: Parameters after compression, if the smallest layers are chosen.
        least: Parameters after compression, if the largest layers are chosen.
        num_layers: Number of replaced or deleted layers, or of layers that lose a block.
        ranks: Rank by linear inside one of the layers; empty if layers are deleted.
        factors: Parameters of the factors alone, or of the weights that get zeros.
        layers: The layers assumed for ``most``.
        operations: The operations on them.
        is_budget: The data decides on ranks, under one budget for all linears of the layers.
        is_per_type: The data decides how ranks differ between linears of one type.
        widths: Kept and original number of channels of every narrowed MLP, by its name; empty if
            the data decides on them.
        experts: Kept and original number of experts of every mixture that loses some, by its name;
            empty if the data decides on them.
        heads: Kept and original number of key/value groups of every attention that loses some, by
            its name; empty if the data decides on them.
        removes_units: A budget is spent on key/value groups and MLP channels, not on ranks.
        is_removable: Layers or blocks may be removed as a whole.
        has_rows: Rows of embedding and head share the budget, too.
        target: What will serve the model, for a budget.
        directions: Kept and original number of directions of the hidden states, if they are sliced.
        is_span: One layer replaces contiguous ones, of which ``num_layers`` are deleted.
        zeros: Number of weights that are set to zero, which saves no parameters.
    """

    dense: int
    most: int
    least: int
    num_layers: int
    ranks: dict[str, int]
    factors: int
    layers: Layers
    operations: tuple[Operation, ...]
    is_budget: bool = False
    is_per_type: bool = False
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    experts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    removes_units: bool = False
    is_removable: bool = False
    has_rows: bool = False
    target: TargetChoice = "any"
    is_span: bool = False
    directions: tuple[int, int] | None = None
    zeros: int = 0

    @property
    def lines(self) -> list[str]:
        """The prediction as text; the first line begins with the removed share."""
        share, larger = (f"{1 - size / self.dense:.1%}" for size in (self.most, self.least))
        if larger != share:
            share += f" to {larger}, depending on the layers chosen,"
        first = f"{share} of {self.dense:,} parameters removed: {self.most:,} remain"
        return [first, *self._what_changes]

    @property
    def _what_changes(self) -> list[str]:
        if self.zeros:
            return [self._zeros_line]
        if self.directions is not None:
            kept, size = self.directions
            return [f"the hidden states keep {kept} of {size} directions in all layers"]
        if self.is_budget:
            return [self._budget_line]
        if self.ranks:
            rows = [f"  {name}: rank {rank}" for name, rank in self.ranks.items()]
            where = f"{self.num_layers} layers are replaced; ranks in one of them:"
            return [where, *rows, *self._smaller_blocks]
        return self._smaller_blocks or [self._layers_line]

    @property
    def _zeros_line(self) -> str:
        return (
            f"{self.zeros / self.dense:.1%} of all parameters become zero, "
            f"{self.zeros / self.factors:.1%} of the weights of {self.num_layers} layers; "
            "zeros are stored like other weights, so the model is no smaller"
        )

    @property
    def _smaller_blocks(self) -> list[str]:
        heads = [f"  {name}: {k} of {n} key/value groups" for name, (k, n) in self.heads.items()]
        widths = [f"  {name}: {k} of {n} channels" for name, (k, n) in self.widths.items()]
        if heads:
            heads = [f"{len(heads)} attention blocks lose heads:", *heads]
        if widths:
            widths = [f"{len(widths)} MLPs are narrowed:", *widths]
        return heads + widths

    @property
    def _layers_line(self) -> str:
        if self.is_span:
            return f"{self.num_layers + 1} contiguous layers are replaced by one"
        blocks = sum(isinstance(op, RemoveBlock) for op in self.operations)
        if blocks:
            return f"{blocks} attention or MLP blocks are removed"
        is_merged = any(isinstance(op, MergeLayers) for op in self.operations)
        return f"{self.num_layers} layers are {'merged into others' if is_merged else 'deleted'}"

    @property
    def _budget_line(self) -> str:
        if self.removes_units:
            where = f"heads and MLP channels of {self.num_layers} layers share one budget"
            return f"{where}: the data decides on their numbers in each layer"
        more = ", on what is removed whole" if self.is_removable else ""
        has_experts = any(isinstance(op, NarrowExperts) for op in self.operations)
        if self.target == "any":
            what = "all linears and experts" if has_experts else "all linears"
            what = f"{what} of {self.num_layers} layers"
            rows = ", and the rows of embedding and head," if self.has_rows else ""
            where = f"{what}{rows} share one budget"
            return f"{where}: the data decides on ranks{more}, and on what stays dense"
        if self.target == "plain":
            for kept, size in self.experts.values():
                what = f"all mixtures keep {kept} of {size} experts"
                return f"attention and MLPs stay dense, and {what}, in an ordinary model folder"
            one = "attention stays dense, and all MLPs get one width"
            for kept, size in self.widths.values():
                return f"{one}: {kept} of {size} channels, in an ordinary model folder"
            removed = "the layers" if self.is_removable else "the experts"
            return f"{one}: the data decides on it, and on {removed} that are removed"
        where = f"attention stays dense, and the MLPs of {self.num_layers} layers share one budget"
        return f"{where}: the data decides on their widths{more}"


class Outlook(NamedTuple):
    """What a method would do to some layers.

    Attributes:
        operations: The operations; for a budget, operations of about its size.
        size: Parameters of the whole model after them.
        factors: Parameters of the factors alone, or of the weights that get zeros.
    """

    operations: tuple[Operation, ...]
    size: int
    factors: int


def outlook_of(view: DecoderView, operations: tuple[Operation, ...]) -> Outlook:
    """Return the outlook of operations that are known in advance."""
    ranks = {module: rank for op in operations for module, rank in op.ranks.items()}
    linears = view.all_linears() if ranks else {}  # without cuts, no linear is reported as skipped
    cut = [(rank, linears[module]) for module, rank in ranks.items()]
    factors = sum(factor_parameters(k, x.out_features, x.in_features) for k, x in cut)
    return Outlook(operations, parameters_after(view, operations), factors)


def predict_layers(
    view: DecoderView,
    candidates: Layers,
    count: int,
    outlook: Callable[[Layers], Outlook],
    *,
    is_contiguous: bool = False,
) -> Prediction:
    """Predict the sizes if ``count`` of the candidate layers were chosen.

    The model is dense, and its weights may be on the meta device.
    """
    sizes = {index: count_parameters(view.layer(index)) for index in candidates}
    by_size = sorted(candidates, key=sizes.__getitem__)
    choices = [tuple(sorted(layers)) for layers in (by_size[:count], by_size[-count:])]
    if is_contiguous:
        spans = [candidates[i : i + count] for i in range(len(candidates) - count + 1)]
        spans.sort(key=lambda span: sum(sizes[index] for index in span))
        choices = [spans[0], spans[-1]]
    found = [(layers, outlook(layers)) for layers in choices]
    layers, likely = max(found, key=lambda entry: entry[1].size)
    prefix = f"{view.layers_name}.{max(reversed(choices[-1]), key=sizes.__getitem__)}."
    largest = found[-1][1].operations
    ranks = {module: rank for op in largest for module, rank in op.ranks.items()}
    return Prediction(
        dense=count_parameters(view.model),
        most=likely.size,
        least=min(entry.size for _, entry in found),
        num_layers=count,
        ranks={n.removeprefix(prefix): k for n, k in ranks.items() if n.startswith(prefix)},
        factors=max(entry.factors for _, entry in found),
        layers=layers,
        operations=likely.operations,
        widths=narrowed_widths(view, likely.operations),
        experts=Plan(method="prediction", operations=likely.operations).experts,
        zeros=sum(op.zeros for op in likely.operations if isinstance(op, SparsifyLinear)),
    )


def predict_units(
    view: DecoderView, layers: Layers, operations: tuple[Operation, ...], size: int | None = None
) -> Prediction:
    """Predict the sizes if key/value groups and MLP channels of some layers are removed.

    The model is dense, and its weights may be on the meta device.

    Args:
        operations: The removals; under a budget, removals of about its size.
        size: Parameters that a budget leaves; None if the operations decide.
    """
    left = parameters_after(view, operations) if size is None else size
    linears = view.all_linears()
    readers = [op for op in operations if isinstance(op, NarrowMlp)]
    is_budget = size is not None
    return Prediction(
        dense=count_parameters(view.model),
        most=left,
        least=left,
        num_layers=len(layers),
        ranks={},
        factors=sum(linears[op.reader].out_features * len(op.channels) for op in readers),
        layers=layers,
        operations=operations,
        is_budget=is_budget,
        removes_units=is_budget,
        widths={} if is_budget else narrowed_widths(view, operations),
        heads={} if is_budget else Plan(method="prediction", operations=operations).heads,
    )


def narrowed_widths(
    view: DecoderView, operations: Iterable[Operation]
) -> dict[str, tuple[int, int]]:
    """Return kept and original number of channels of narrowed MLPs and experts, by their names."""
    found: dict[str, tuple[int, int]] = {}
    for op in operations:
        if isinstance(op, NarrowMlp):
            modules = view.dense_modules(view.layer_of(op.reader) or 0)
            found[op.mlp] = (len(op.channels), dense_shape(modules[op.reader])[1])
        elif isinstance(op, NarrowExperts):
            experts = experts_in(view, view.layer_of(op.experts) or 0)
            found[op.experts] = (op.width, experts[op.experts].width)
    return found
