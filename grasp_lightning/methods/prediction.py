"""What a method would remove, from shapes alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.ranks import factor_parameters, ranks_for_budget
from grasp_lightning.methods import (
    configured_layers,
    configured_rank_rule,
    resolve_num_layers,
)
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.methods.global_ranks import Budgeted, GlobalRanks
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, FactorizeLinear, NarrowMlp, Operation, Plan


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Sizes before and after, without data.

    Attributes:
        dense: Parameters of the model, tied ones counted once.
        most: Parameters after compression, if the smallest layers are chosen.
        least: Parameters after compression, if the largest layers are chosen.
        num_layers: Number of layers that are replaced or deleted.
        ranks: Rank by linear, inside one of the layers; empty if layers are deleted.
        factors: Parameters of the factors alone.
        layers: The layers that were assumed for ``most``.
        operations: What is done to them.
        is_budget: Ranks follow from the data, under one budget for all linears of the layers.
        widths: Kept and original number of channels of every narrowed MLP, by its name; empty for a
            budget.
        is_timed: It is a budget of time: sizes are those of factors that keep its share of
            parameters, as an estimate of memory.
        is_removable: Layers or blocks may go as a whole.
    """

    dense: int
    most: int
    least: int
    num_layers: int
    ranks: dict[str, int]
    factors: int
    layers: tuple[int, ...]
    operations: tuple[Operation, ...]
    is_budget: bool = False
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_timed: bool = False
    is_removable: bool = False

    @property
    def lines(self) -> list[str]:
        """The prediction as text; the first line begins with the removed share, if it is known."""
        share, larger = (f"{1 - size / self.dense:.1%}" for size in (self.most, self.least))
        if larger != share:
            share += f" to {larger}, depending on the layers chosen,"
        first = f"{share} of {self.dense:,} parameters removed: {self.most:,} remain"
        widths = [f"  {mlp}: {k} of {size} channels" for mlp, (k, size) in self.widths.items()]
        if widths:
            widths = [f"{len(widths)} MLPs are narrowed:", *widths]
        if self.is_timed:
            first = "a budget of measured time: the data decides on sizes"
        if self.is_budget:
            where = f"all linears of {self.num_layers} layers share one budget"
            more = ", on what goes as a whole" if self.is_removable else ""
            return [first, f"{where}: the data decides on ranks{more}, and on what stays dense"]
        if self.ranks:
            rows = [f"  {name}: rank {rank}" for name, rank in self.ranks.items()]
            where = f"{self.num_layers} layers are replaced; ranks in one of them:"
            return [first, where, *rows, *widths]
        return [first, *(widths or [f"{self.num_layers} layers are deleted"])]


def predict(view: DecoderView, method: MethodConfig) -> Prediction:
    """Return the sizes before and after compression, from shapes alone.

    More layers than the model has, and a budget out of reach, are a ``ConfigError``; layers that
    cannot be deleted are a ``ModelError``.

    Args:
        view: The model; its weights may be on the meta device.
        method: Options as ``resolve_method`` returns them.

    Returns:
        The prediction.

    Raises:
        ModelError: If no layer would be left.
    """
    method = resolve_num_layers(method, view)
    choice = configured_layers(method)
    choice.check(view.num_layers)
    dense = count_parameters(view.model)
    rule = configured_rank_rule(method, dense)
    if choice.count == view.num_layers and rule is None:
        raise ModelError(
            f"all {view.num_layers} decoder layers would be deleted; leave at least one"
        )
    if rule is None:
        choice.check_drop(view)
    if isinstance(rule, GlobalRanks):
        return _predict_budget(view, rule, choice)
    by_size = sorted(choice.layers or view.layer_indices, key=lambda index: _size(view, index))
    sizes, ranks, factors, planned = [], {}, 0, []
    for layers in (by_size[: choice.count], by_size[-choice.count :]):
        operations: tuple[Operation, ...] = (DropLayers(layers=tuple(sorted(layers))),)
        if rule is not None:
            shapes = weight_shapes(view, Plan(method=method.name), tuple(layers))
            ranks = rule.ranks(shapes)
            factors = sum(factor_parameters(rank, *shapes[name]) for name, rank in ranks.items())
            operations = tuple(
                FactorizeLinear(module=name, rank=rank, components=None)
                for name, rank in ranks.items()
            )
        sizes.append(parameters_after(view, operations))
        planned.append(operations)
    prefix = f"{view.layers_name}.{by_size[-1]}."
    return Prediction(
        dense=dense,
        most=max(sizes),
        least=min(sizes),
        num_layers=choice.count,
        ranks={n.removeprefix(prefix): r for n, r in ranks.items() if n.startswith(prefix)},
        factors=factors,
        layers=tuple(sorted(by_size[: choice.count])),
        operations=planned[0],
        widths=narrowed_widths(view, planned[0]),
    )


def _predict_budget(view: DecoderView, rule: GlobalRanks, choice: LayerChoice) -> Prediction:
    """Return the size that a budget leaves; which layers and ranks, the data decides.

    As operations it has one keep ratio for all, which takes about as much memory.
    """
    dense, sizes, factors, planned = count_parameters(view.model), [], [], []
    by_size = sorted(choice.layers or view.layer_indices, key=lambda index: _size(view, index))
    for layers in (by_size[: choice.count], by_size[-choice.count :]):
        budgeted = rule.budgeted(view, tuple(sorted(layers)))
        kept, whole = rule.budget(budgeted), rule.dense_size(budgeted)
        operations = _evenly(budgeted, kept / whole)
        factors.append(kept)
        sizes.append(dense - whole + kept)
        planned.append((sizes[-1], tuple(sorted(layers)), operations))
    most, layers_of_most, operations_of_most = max(planned, key=lambda entry: entry[0])
    return Prediction(
        dense=dense,
        most=most,
        least=min(sizes),
        num_layers=choice.count,
        ranks={},
        factors=max(factors),
        layers=layers_of_most,
        operations=operations_of_most,
        is_budget=True,
        is_timed=rule.unit == "time",
        is_removable=rule.removable != "none",
    )


def _evenly(budgeted: Budgeted, share: float) -> tuple[Operation, ...]:
    """Return operations that keep the same share of every matrix and of every MLP."""
    shapes = budgeted.shapes
    size = sum(rows * columns for rows, columns in shapes.values())
    least = sum(factor_parameters(1, *shape) for shape in shapes.values())
    ranks = ranks_for_budget(tuple(shapes.values()), max(int(share * size), least))
    cut = (
        FactorizeLinear(module=name, rank=rank, components=None)
        for name, rank in zip(shapes, ranks, strict=True)
    )
    narrowed = (
        NarrowMlp(
            reader=name,
            writers=mlp.writers,
            channels=tuple(range(max(1, int(share * mlp.num_channels)))),
        )
        for name, mlp in budgeted.mlps.items()
        if share * mlp.num_channels < mlp.num_channels
    )
    return (*cut, *narrowed)


def narrowed_widths(
    view: DecoderView, operations: Iterable[Operation]
) -> dict[str, tuple[int, int]]:
    """Return how wide operations leave the MLPs that they narrow.

    Args:
        view: The model before.
        operations: What is done.

    Returns:
        Name of the MLP in the original model -> number of kept and of original channels.
    """
    narrowed = [op for op in operations if isinstance(op, NarrowMlp)]
    readers = {op: view.dense_modules(view.layer_of(op.reader) or 0) for op in narrowed}
    return {
        op.mlp: (len(op.channels), dense_shape(modules[op.reader])[1])
        for op, modules in readers.items()
    }


def _size(view: DecoderView, index: int) -> int:
    return count_parameters(view.layer(index))
