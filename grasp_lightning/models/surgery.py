"""The only module that changes models: it applies the operations of a plan."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grasp_lightning.errors import PlanError
from grasp_lightning.models.checkpoint import attach_quantizer, check_not_quantized
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import settle_number
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.models.operations import applier_of
from grasp_lightning.models.operations.base import Site, dense_module
from grasp_lightning.models.operations.remove_experts import experts_left
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.models.size import LinearShape
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.plan import Operation


def apply_operations(
    view: DecoderView, operations: Sequence[Operation], tensors: Mapping[str, Tensor]
) -> None:
    """Apply a plan to a model in place, or leave the model unchanged if any part does not fit.

    A ``PlanError`` names an operation that does not fit, or a tensor that is missing, has another
    shape, or is not finite in the dtype of the weight that it replaces. Names and layer numbers are
    the original ones. Tensors may be of any float dtype and on any device.
    """
    _check(view, operations, tensors)
    weights = streamed_weights(view.model)
    if weights is not None:
        weights.note(view, operations, tensors)
    num_experts = experts_left(view, operations)
    _apply(view, operations, tensors)
    if num_experts is not None:
        settle_number(view, num_experts)


def _check(
    view: DecoderView, operations: Sequence[Operation], tensors: Mapping[str, Tensor]
) -> None:
    _checked(view, operations)
    for operation in operations:
        _check_tensors(view, operation, tensors)


def _apply(
    view: DecoderView, operations: Sequence[Operation], tensors: Mapping[str, Tensor]
) -> None:
    for operation in operations:
        applier_of(operation).apply(view, operation, tensors)
    if is_sharded(view.model):
        gc.collect()  # sharded modules and their FSDP state form reference cycles
    attach_quantizer(view.model)


def replacements(
    view: DecoderView, operations: Sequence[Operation], tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Return the modules that operations would put into a model, by the modules they replace.

    The model stays unchanged and shares its biases with them. Arguments and errors: see
    ``apply_operations``.
    """
    replaced = {name: view.module(name) for operation in operations for name in operation.modules}
    _check(view, operations, tensors)
    _apply(view, operations, tensors)
    new = {name: view.module(name) for name in replaced}
    for name, module in replaced.items():
        view.set_module(name, module)
    attach_quantizer(view.model)
    return new


@contextmanager
def in_place_of_linears(view: DecoderView, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Temporarily put modules, by the names of those they replace, into a model."""
    usual = {name: view.module(name) for name in modules}
    try:
        for name, module in modules.items():
            view.set_module(name, module)
        yield
    finally:
        for name, module in usual.items():
            view.set_module(name, module)


def parameters_after(view: DecoderView, operations: Sequence[Operation]) -> int:
    """Return the number of parameters a model would have after operations, tied ones counted once.

    Only shapes matter, so the meta device works. A ``PlanError`` names an operation that does not
    fit.
    """
    new, dropped = _checked(view, operations)
    gone = {id(module) for index in dropped for module in view.layer(index).modules()}
    shapes = {id(view.module(name)): shape for name, shape in new.items()}
    # By identity and through every owner: a weight tied to a remaining one remains.
    kept: dict[int, int] = {}
    added = sum(applier_of(operation).num_added(operation, view) for operation in operations)
    for module in view.model.modules():
        if id(module) in gone:
            continue
        parameters = dict(module.named_parameters(recurse=False))
        shape = shapes.pop(id(module), None)
        if shape is not None:
            added += shape.parameters
            del parameters["weight"]
            if "bias" in parameters and shape.rows != len(parameters["bias"]):
                added += shape.rows
                del parameters["bias"]
        kept.update((id(parameter), parameter.numel()) for parameter in parameters.values())
    return sum(kept.values()) + added


def _checked(
    view: DecoderView, operations: Sequence[Operation]
) -> tuple[dict[str, LinearShape], set[int]]:
    """Check operations; return the shapes of replaced linears by name, and the dropped layers."""
    check_not_quantized(view.model, PlanError)
    new: dict[str, LinearShape] = {}
    own: set[str] = set()  # names of tensors that belong to no linear
    left = set(view.layer_indices)
    others: set[str] = set()  # replaced modules that are no linears
    for number, operation in enumerate(operations):
        applier = applier_of(operation)
        for module in set(operation.modules) - set(operation.linears):
            if module in others:
                raise PlanError(f"the plan {applier.verb} {module} twice")
            others.add(module)
        for module in operation.linears:
            _check_untouched(applier.verb, module, new.get(module))
            if view.layer_of(module) in set(view.layer_indices) - left:
                raise PlanError(
                    f"the plan {applier.verb} {module} after dropping its decoder layer"
                )
        dense = _dense_shapes(view, operation)
        site = Site(view, dense, left, new, tuple(operations[:number]))
        applier.check(operation, site)
        for key in applier.tensor_shapes(operation, site.dense).keys() & own:
            module = key.rpartition(".")[0]
            raise PlanError(f"the plan {applier.verb} {module} after setting its weights")
        own |= applier.own_tensors(operation, view).keys()
        new |= applier.new_shapes(operation, site.dense)
        left.difference_update(operation.dropped)
    if not left:
        number = len(view.layer_indices)
        raise PlanError(f"the plan drops all {number} decoder layers: one must remain")
    return new, set(view.layer_indices) - left


def _check_untouched(verb: str, module: str, earlier: LinearShape | None) -> None:
    """Check that no earlier operation has replaced a linear."""
    if earlier is not None:
        done = "narrows" if earlier.is_narrowed else "changes"
        done = done if earlier.rank is None else "factorizes"
        how = "twice" if verb == done else f"and {done} it, too"
        raise PlanError(f"the plan {verb} {module} {how}")


def _check_tensors(view: DecoderView, operation: Operation, tensors: Mapping[str, Tensor]) -> None:
    applier = applier_of(operation)
    expected = {
        key: (shape, dense_module(view, key.rpartition(".")[0]).weight.dtype)
        for key, shape in applier.tensor_shapes(operation, _dense_shapes(view, operation)).items()
    }
    own = applier.own_tensors(operation, view)
    expected |= {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in own.items()}
    for key, (shape, dtype) in expected.items():
        if key not in tensors:
            raise PlanError(f"{applier.noun} {key} is missing")
        given = tuple(tensors[key].shape)
        if given != shape:
            raise PlanError(f"{applier.noun} {key} must have shape {shape}, got {given}")
        # After the cast: what is finite in float32 can overflow in float16.
        if not torch.isfinite(tensors[key].to(dtype)).all():
            raise PlanError(f"{applier.noun} {key} has values that are not finite in {dtype}")


def _dense_shapes(view: DecoderView, operation: Operation) -> dict[str, LinearShape]:
    verb = applier_of(operation).verb
    linears = {name: dense_module(view, name, verb) for name in operation.linears}
    return {name: LinearShape(*dense_shape(linear)) for name, linear in linears.items()}
