"""What the operations of a plan would make of a model, and whether they fit it; changes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.checkpoint import foreign_quantizer
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    NarrowMlp,
    Operation,
    RemoveBlock,
    SelectLayers,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What operations lead to.

    Attributes:
        ranks: Ranks of factorised linears, by name; 0 of those in removed blocks.
        shapes: New (out_features, in_features) of narrowed linears, by name.
        dropped: Dropped layers.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)


def check_operations(view: DecoderView, operations: Sequence[Operation]) -> Changes:
    """Return what operations lead to.

    Args:
        view: The model.
        operations: What would be done, in order.

    Returns:
        New ranks and shapes, and dropped layers.

    Raises:
        PlanError: If an operation does not fit the model, or what is done before it.
    """
    foreign = foreign_quantizer(view.model)
    if foreign is not None:
        raise PlanError(
            f"the model is quantized with {foreign}; expected floating-point weights, so load it "
            f"dequantized and without its quantization state"
        )
    changes = Changes()
    for operation in operations:
        match operation:
            case FactorizeLinear():
                _check_factorize(view, operation, changes)
                changes.ranks[operation.module] = operation.rank
            case NarrowMlp():
                _check_narrow(view, operation, changes)
                changes.shapes.update(narrowed_shapes(view, operation))
            case RemoveBlock(modules=modules):
                _check_remove(view, operation, changes)
                changes.ranks.update(dict.fromkeys(modules, 0))
            case DropLayers() | SelectLayers():
                _check_layers(view, operation, changes)
    if len(changes.dropped) == len(view.layer_indices):
        raise PlanError(
            f"the plan drops all {len(changes.dropped)} decoder layers: one must be left"
        )
    return changes


def _check_droppable(view: DecoderView) -> None:
    try:
        view.check_droppable()
    except ModelError as error:
        raise PlanError(f"the plan drops decoder layers: {error}") from error


def _check_layers(
    view: DecoderView, operation: DropLayers | SelectLayers, changes: Changes
) -> None:
    layers, dropped = operation.layers, changes.dropped
    if isinstance(operation, DropLayers):
        _check_droppable(view)
    if len(set(layers)) != len(layers):
        raise PlanError(f"the plan names a decoder layer twice in {list(layers)}")
    left = set(view.layer_indices) - dropped
    missing = sorted(set(layers) - left)
    if missing:
        raise PlanError(f"the plan names decoder layers {missing}, the model has {sorted(left)}")
    if isinstance(operation, DropLayers):
        dropped.update(layers)


def _check_untouched(view: DecoderView, verb: str, module: str, changes: Changes) -> None:
    """Check that nothing before in the plan has replaced or dropped a linear."""
    for other, earlier in (("factorizes", changes.ranks), ("narrows", changes.shapes)):
        if module in earlier:
            how = "twice" if verb == other else f"and {other} it, too"
            raise PlanError(f"the plan {verb} {module} {how}")
    if any(module.startswith(f"{view.layers_name}.{index}.") for index in changes.dropped):
        raise PlanError(f"the plan {verb} {module} after dropping its decoder layer")


def _check_factorize(view: DecoderView, operation: FactorizeLinear, changes: Changes) -> None:
    module, rank = operation.module, operation.rank
    _check_untouched(view, "factorizes", module, changes)
    largest = min(dense_shape(dense_module(view, module)))
    if not 1 <= rank <= largest:
        raise PlanError(f"rank of {module} must be from 1 to {largest}, the plan says {rank}")
    components = operation.components
    if components is None:
        return
    if len(components) != rank or len(set(components)) != rank:
        raise PlanError(
            f"{module} has rank {rank}, but the plan keeps components {list(components)}"
        )
    if not all(0 <= component < largest for component in components):
        raise PlanError(
            f"components of {module} must be from 0 to {largest - 1}, the plan keeps "
            f"{list(components)}"
        )


def _check_narrow(view: DecoderView, operation: NarrowMlp, changes: Changes) -> None:
    names = (operation.reader, *operation.writers)
    if not operation.writers or len(set(names)) != len(names):
        raise PlanError(
            f"the plan narrows the MLP of {operation.reader}: expected other linears that write "
            f"its channels, each once, got {list(operation.writers)}"
        )
    for name in names:
        _check_untouched(view, "narrows", name, changes)
        if name.rpartition(".")[0] != operation.mlp:
            raise PlanError(f"the plan narrows {name}: it is not in one module with {names[0]}")
    num_channels = dense_shape(dense_module(view, operation.reader, "narrows"))[1]
    for name in operation.writers:
        rows = dense_shape(dense_module(view, name, "narrows"))[0]
        if rows % num_channels:
            raise PlanError(
                f"the plan narrows {name}: its {rows} outputs are no multiple of the "
                f"{num_channels} channels that {operation.reader} reads"
            )
    _check_channels(operation, num_channels)


def _check_remove(view: DecoderView, operation: RemoveBlock, changes: Changes) -> None:
    modules = operation.modules
    if not modules or len(set(modules)) != len(modules):
        raise PlanError(
            f"the plan removes {operation.block}: expected its linears, each once, got "
            f"{list(modules)}"
        )
    for module in modules:
        _check_untouched(view, "removes", module, changes)
        dense_module(view, module, "removes")


def _check_channels(operation: NarrowMlp, num_channels: int) -> None:
    kept, reader = operation.channels, operation.reader
    if not 1 <= len(kept) < num_channels:
        raise PlanError(
            f"the plan keeps {len(kept)} channels of {reader}: it must keep from 1 to "
            f"{num_channels - 1}"
        )
    if any(low >= high for low, high in pairwise(kept)):
        raise PlanError(f"the plan keeps channels of {reader} that are not ascending")
    if kept[0] < 0 or kept[-1] >= num_channels:
        raise PlanError(
            f"channels of {reader} must be from 0 to {num_channels - 1}, the plan keeps "
            f"{kept[0]} to {kept[-1]}"
        )


def check_tensors(view: DecoderView, operation: Operation, tensors: Mapping[str, Tensor]) -> None:
    """Check the factors of a linear, or the new weight of what reads an MLP's channels."""
    match operation:
        case FactorizeLinear(module=module, rank=rank):
            linear = dense_module(view, module)
            rows, columns = dense_shape(linear)
            for side, shape in (("left", (rows, rank)), ("right", (rank, columns))):
                _check_tensor("factor", f"{module}.{side}", shape, linear, tensors)
        case NarrowMlp(reader=reader, channels=channels):
            linear = dense_module(view, reader)
            shape = (dense_shape(linear)[0], len(channels))
            _check_tensor("weight", f"{reader}.weight", shape, linear, tensors)


def _check_tensor(
    noun: str,
    key: str,
    shape: tuple[int, int],
    linear: DenseModule,
    tensors: Mapping[str, Tensor],
) -> None:
    if key not in tensors:
        raise PlanError(f"{noun} {key} is missing")
    tensor = tensors[key]
    if tuple(tensor.shape) != shape:
        raise PlanError(f"{noun} {key} must have shape {shape}, got {tuple(tensor.shape)}")
    # After the cast: what is finite in float32 can overflow in float16.
    if not torch.isfinite(tensor.to(linear.weight.dtype)).all():
        raise PlanError(f"{noun} {key} has values that are not finite in {linear.weight.dtype}")


def dense_module(view: DecoderView, module: str, verb: str = "factorizes") -> DenseModule:
    """Return a linear that a plan replaces.

    Args:
        view: The model.
        module: Full name in the original model.
        verb: What the plan does to it, for messages.

    Returns:
        The module.

    Raises:
        PlanError: If it is not there, no dense linear that can be replaced, or not floating point.
    """
    try:
        linear = view.module(module)
    except ModelError as error:
        raise PlanError(f"the plan {verb} {module}: {error}") from error
    if not isinstance(linear, DenseModule):
        raise PlanError(
            f"the plan {verb} {module}: expected a Linear, the model has {type(linear).__name__}"
        )
    index = view.layer_of(module)
    if index is not None and module not in view.dense_modules(index):
        raise PlanError(
            f"the plan {verb} {module}: it is part of a mixture of experts, or of a linear that "
            f"is low-rank already, or is narrowed already"
        )
    if not linear.weight.is_floating_point():
        raise PlanError(f"weight of {module} must be floating point, got {linear.weight.dtype}")
    return linear


def narrowed_shapes(view: DecoderView, operation: NarrowMlp) -> dict[str, tuple[int, int]]:
    """Return the new (out_features, in_features) of the linears of an MLP, by name."""
    rows, num_channels = dense_shape(dense_module(view, operation.reader))
    kept = len(operation.channels)
    shapes = {operation.reader: (rows, kept)}
    for writer in operation.writers:
        out_features, in_features = dense_shape(dense_module(view, writer))
        shapes[writer] = (out_features // num_channels * kept, in_features)
    return shapes


def new_parameters(changes: Changes, name: str | None) -> tuple[str, ...]:
    """Return the parameters of a module that others replace; of no name: it stays as it is."""
    if name in changes.shapes:
        return ("weight", "bias")
    return () if name is None else ("weight",)


def new_size(changes: Changes, name: str, linear: DenseModule) -> int:
    """Return the number of parameters that take their place."""
    if name in changes.ranks:
        return changes.ranks[name] * sum(dense_shape(linear))
    rows, columns = changes.shapes[name]
    return rows * columns + (rows if linear.bias is not None else 0)
