"""``plan``: what a configuration would remove, from the model's shapes alone."""

from dataclasses import dataclass, replace

from grasp_lightning.config import CompressConfig, MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.ranks import factor_parameters
from grasp_lightning.methods import (
    configured_layers,
    configured_rank_rule,
    resolve_method,
    resolve_num_layers,
)
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.methods.global_ranks import GlobalRanks
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_meta_model
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, FactorizeLinear, Operation, Plan


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
        is_budget: Ranks follow from the data, under one budget for all linears of the layers.
    """

    dense: int
    most: int
    least: int
    num_layers: int
    ranks: dict[str, int]
    factors: int
    is_budget: bool = False

    @property
    def lines(self) -> list[str]:
        """The prediction as text; the first line begins with the removed share in percent."""
        share, larger = (f"{1 - size / self.dense:.1%}" for size in (self.most, self.least))
        if larger != share:
            share += f" to {larger}, depending on the layers chosen,"
        first = f"{share} of {self.dense:,} parameters removed: {self.most:,} remain"
        if self.is_budget:
            where = f"all linears of {self.num_layers} layers share one budget"
            return [first, f"{where}: the data decides on ranks, and on what stays dense"]
        if not self.ranks:
            return [first, f"{self.num_layers} layers are deleted"]
        rows = [f"  {name}: rank {rank}" for name, rank in self.ranks.items()]
        return [first, f"{self.num_layers} layers are replaced; ranks in one of them:", *rows]


def predict(view: DecoderView, method: MethodConfig) -> Prediction:
    """Return the sizes before and after compression, from shapes alone.

    More layers than the model has, and a budget out of reach, are a ``ConfigError``.

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
    if isinstance(rule, GlobalRanks):
        return _predict_budget(view, rule, choice)
    by_size = sorted(choice.layers or view.layer_indices, key=lambda index: _size(view, index))
    sizes, ranks, factors = [], {}, 0
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
    prefix = f"{view.layers_name}.{by_size[-1]}."
    return Prediction(
        dense=dense,
        most=max(sizes),
        least=min(sizes),
        num_layers=choice.count,
        ranks={n.removeprefix(prefix): r for n, r in ranks.items() if n.startswith(prefix)},
        factors=factors,
    )


def _predict_budget(view: DecoderView, rule: GlobalRanks, choice: LayerChoice) -> Prediction:
    """Return the size that a budget leaves; which layers and ranks, the data decides."""
    dense, sizes, factors = count_parameters(view.model), [], []
    by_size = sorted(choice.layers or view.layer_indices, key=lambda index: _size(view, index))
    for layers in (by_size[: choice.count], by_size[-choice.count :]):
        shapes = weight_shapes(view, Plan(method="plan"), tuple(layers))
        factors.append(rule.budget(shapes))
        sizes.append(dense - sum(n * m for n, m in shapes.values()) + factors[-1])
    return Prediction(
        dense=dense,
        most=max(sizes),
        least=min(sizes),
        num_layers=choice.count,
        ranks={},
        factors=max(factors),
        is_budget=True,
    )


def run_plan(config: CompressConfig) -> Prediction:
    """Return what a configuration would remove; reads no weights.

    Args:
        config: The same configuration that ``compress`` takes.

    Returns:
        The prediction.
    """
    config = replace(config, method=resolve_method(config.method))
    return predict(DecoderView(load_meta_model(config.model)), config.method)


def _size(view: DecoderView, index: int) -> int:
    return count_parameters(view.layer(index))
