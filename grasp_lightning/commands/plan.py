"""``plan``: what a configuration would remove, and the memory it takes, from shapes alone."""

from dataclasses import dataclass, replace

from grasp_lightning.commands.memory import (
    calibration_plan,
    compensation_plan,
    compensation_settings,
)
from grasp_lightning.commands.model_shape import model_shape, shape_after
from grasp_lightning.config import MethodConfig, PlanConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.ranks import factor_parameters
from grasp_lightning.methods import (
    configured_layers,
    configured_rank_rule,
    resolve_method,
    resolve_num_layers,
)
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_meta_model
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import DropLayers, FactorizeLinear, Operation, Plan
from grasp_lightning.reporting.memory import CalibrationPlan, CompensationPlan, memory_lines


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
    """

    dense: int
    most: int
    least: int
    num_layers: int
    ranks: dict[str, int]
    factors: int
    layers: tuple[int, ...]
    operations: tuple[Operation, ...]

    @property
    def lines(self) -> list[str]:
        """The prediction as text; the first line begins with the removed share in percent."""
        share, larger = (f"{1 - size / self.dense:.1%}" for size in (self.most, self.least))
        if larger != share:
            share += f" to {larger}, depending on the layers chosen,"
        first = f"{share} of {self.dense:,} parameters removed: {self.most:,} remain"
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
    )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What ``plan`` tells.

    Attributes:
        prediction: Sizes before and after.
        calibration: Memory of a calibration.
        compensation: Memory of a compensation after it.
    """

    prediction: Prediction
    calibration: CalibrationPlan
    compensation: CompensationPlan

    @property
    def lines(self) -> list[str]:
        """All of it as text; the first line begins with the removed share in percent."""
        memory = memory_lines(self.calibration, self.compensation)
        return [*self.prediction.lines, "", *memory]


def run_plan(config: PlanConfig) -> Planned:
    """Return what a configuration would remove and the memory it takes; reads no weights.

    Args:
        config: The same configuration that ``compress`` takes, and the name of one that
            ``compensate`` takes.

    Returns:
        Sizes and memory.
    """
    config = replace(config, method=resolve_method(config.method))
    compensate = compensation_settings(config)
    view = DecoderView(load_meta_model(config.model))
    prediction = predict(view, config.method)
    dense = model_shape(view)
    compressed = shape_after(dense, prediction.operations, prediction.most)
    return Planned(
        prediction=prediction,
        calibration=calibration_plan(config, dense, compressed, prediction.layers),
        compensation=compensation_plan(config, compensate, dense, compressed),
    )


def _size(view: DecoderView, index: int) -> int:
    return count_parameters(view.layer(index))
