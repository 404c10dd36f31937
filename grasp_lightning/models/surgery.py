"""The only module that changes models: it applies the operations of a plan."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.changes import (
    check_operations,
    check_tensors,
    dense_module,
    narrowed_shapes,
    new_parameters,
    new_size,
)
from grasp_lightning.models.checkpoint import attach_quantizer
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import (
    LowRankLinear,
    NarrowedLinear,
    dense_shape,
    low_rank_linears,
    narrowed_linears,
)
from grasp_lightning.models.sharding import is_sharded, shard_like, whole
from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    LinearOperation,
    NarrowMlp,
    Operation,
    RemoveBlock,
    SelectLayers,
)


def apply_operations(
    view: DecoderView, operations: Sequence[Operation], tensors: Mapping[str, Tensor]
) -> None:
    """Change a model as a plan says, or not at all if any part of the plan does not fit it.

    A ``PlanError`` says which operation does not fit, or which tensor is missing, of another
    shape, or not finite in the dtype of the weight it replaces.

    A writer of c times as many outputs as an MLP has channels I holds c parts one after the other
    (gate and up): it keeps the rows ``j + p I`` of each kept channel j, p from 0 to c - 1.

    Args:
        view: The model, changed in place.
        operations: What to do, in order, with names and layer numbers of the original model.
        tensors: Factors of the factorised linears, ``<module>.left`` ``(N, r)`` and
            ``<module>.right`` ``(r, M)`` for a weight ``(N, M)``; of each narrowed MLP, the
            reader's weight on its k kept channels, ``<reader>.weight`` ``(N, k)``. Any float dtype
            and device. Others are ignored.
    """
    check_operations(view, operations)
    for operation in operations:
        check_tensors(view, operation, tensors)
    for operation in operations:
        _apply(view, operation, tensors)
    if is_sharded(view.model):
        gc.collect()  # a sharded module and what brings its parts together hold each other
    attach_quantizer(view.model)


def replacements(
    view: DecoderView, operations: Sequence[LinearOperation], tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Return the modules that operations would put into a model, and leave it as it is.

    Errors are those of ``apply_operations``.

    Args:
        view: The model.
        operations: What would be done to its linears.
        tensors: See ``apply_operations``.

    Returns:
        Module by the full name of the linear that it replaces; biases are those of the model.
    """
    replaced = {name: view.module(name) for operation in operations for name in operation.modules}
    apply_operations(view, operations, tensors)
    new = {name: view.module(name) for name in replaced}
    for name, module in replaced.items():
        view.set_module(name, module)
    attach_quantizer(view.model)
    return new


@contextmanager
def in_place_of_linears(view: DecoderView, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules into a model for the duration of a ``with`` block.

    Args:
        view: The model.
        modules: Module by the full name of the linear that it stands in for.

    Yields:
        Nothing.
    """
    usual = {name: view.module(name) for name in modules}
    try:
        for name, module in modules.items():
            view.set_module(name, module)
        yield
    finally:
        for name, module in usual.items():
            view.set_module(name, module)


def parameters_after(view: DecoderView, operations: Sequence[Operation]) -> int:
    """Return how many parameters a model would have after operations, tied ones counted once.

    Shapes alone decide, so a model on the meta device will do. Nothing is changed. A ``PlanError``
    says which operation does not fit.

    Args:
        view: The model.
        operations: What would be done, in order.

    Returns:
        Number of parameters of the whole model.
    """
    changes = check_operations(view, operations)
    gone = {id(module) for index in changes.dropped for module in view.layer(index).modules()}
    names = changes.ranks.keys() | changes.shapes.keys()
    linears = {name: dense_module(view, name) for name in names}
    linears = {name: linear for name, linear in linears.items() if id(linear) not in gone}
    replaced = {id(linear): name for name, linear in linears.items()}
    # By identity, and through every owner: a weight tied to one that stays does not go away.
    kept: dict[int, int] = {}
    for module in view.model.modules():
        if id(module) not in gone:
            new = new_parameters(changes, replaced.get(id(module)))
            for name, parameter in module.named_parameters(recurse=False):
                if name not in new:
                    kept[id(parameter)] = parameter.numel()
    return sum(kept.values()) + sum(
        new_size(changes, name, linear) for name, linear in linears.items()
    )


def densify(
    model: PreTrainedModel, track: Callable[[Sequence[str]], Iterable[str]] = tuple
) -> tuple[str, ...]:
    """Multiply factors back into dense weights, and fill narrowed MLPs up with zeros.

    Each linear gets back the module of its family, with the bias as it is, so that the model
    becomes an ordinary one of its class, of the size it had before its linears were replaced.
    Products are computed in float32 or better, and have the factors' dtype and device; the meta
    device will do. The channels of an MLP have no order, so the kept ones come first. A
    ``NumericsError`` names a linear whose product overflows its dtype.

    Args:
        model: A model with low-rank or narrowed linears, changed in place once all weights are
            there and finite.
        track: Shows progress: names of the linears -> the same names.

    Returns:
        Full names of the linears that are dense now, sorted.

    Raises:
        ModelError: If the model has no such linears, or a narrowed one is not part of an MLP.
    """
    factors, narrowed = low_rank_linears(model), narrowed_linears(model)
    if not factors and not narrowed:
        raise ModelError(
            f"{type(model).__name__} has no low-rank linears, so there are no factors to multiply, "
            f"and no narrowed ones: expected a model whose linears were replaced by compress"
        )
    originals = _without_factors(model)
    dense = {name: _dense_original(originals, name) for name in (*factors, *narrowed)}
    parts = {name: _num_parts(name, narrowed, dense) for name in narrowed}
    weights = {
        name: _product(name, factors[name], dense[name])
        if name in factors
        else _padded(narrowed[name], dense[name], parts[name])
        for name in track(sorted(dense))
    }
    for name, module in weights.items():
        model.set_submodule(name, module)
    attach_quantizer(model)
    return tuple(weights)


def _apply(view: DecoderView, operation: Operation, tensors: Mapping[str, Tensor]) -> None:
    match operation:
        case FactorizeLinear(module=module):
            left, right = tensors[f"{module}.left"], tensors[f"{module}.right"]
            _factorize(view, module, left, right)
        case RemoveBlock(modules=modules):
            for module in modules:
                rows, columns = dense_shape(dense_module(view, module))
                _factorize(view, module, torch.empty(rows, 0), torch.empty(0, columns))
        case NarrowMlp():
            _narrow(view, operation, tensors)
        case DropLayers():
            view.drop(operation.layers)
        case SelectLayers():
            pass


def _factorize(view: DecoderView, module: str, left: Tensor, right: Tensor) -> None:
    old = dense_module(view, module)
    # On the meta device first: no memory for values that are replaced at once, no random numbers
    # drawn.
    rows, columns = dense_shape(old)
    bias = old.bias is not None
    new = LowRankLinear(columns, rows, len(right), bias=bias, device="meta")
    for factor, given in ((new.left, left), (new.right, right)):
        if new.rank == 0:
            factor._buffers["weight"] = _like(given, old.weight).detach()
        else:
            factor.weight = _like(given, old.weight)
    if old.bias is not None:
        new.left.bias = _whole_copy(old.bias)
    shard_like(new, old)
    view.set_module(module, new.train(old.training))


def _narrow(view: DecoderView, operation: NarrowMlp, tensors: Mapping[str, Tensor]) -> None:
    shapes = narrowed_shapes(view, operation)
    reader = dense_module(view, operation.reader)
    num_channels = dense_shape(reader)[1]
    weight = _like(tensors[f"{operation.reader}.weight"], reader.weight)
    bias = None if reader.bias is None else _whole_copy(reader.bias)
    _set_narrowed(view, operation.reader, weight, bias)
    kept = torch.tensor(operation.channels)
    for writer in operation.writers:
        old = dense_module(view, writer)
        num_parts = shapes[writer][0] // len(kept)
        rows = torch.cat([kept + part * num_channels for part in range(num_parts)])
        weight = _kept_rows(old.weight, rows, is_transposed=isinstance(old, Conv1D))
        bias = None if old.bias is None else _kept_rows(old.bias, rows)
        _set_narrowed(view, writer, weight, bias)


def _set_narrowed(
    view: DecoderView, module: str, weight: nn.Parameter, bias: nn.Parameter | None
) -> None:
    old = view.module(module)
    rows, columns = weight.shape
    new = NarrowedLinear(columns, rows, bias=bias is not None, device="meta")
    new.weight = weight
    new.register_parameter("bias", bias)
    shard_like(new, old)
    view.set_module(module, new.train(old.training))


def _kept_rows(parameter: Tensor, rows: Tensor, *, is_transposed: bool = False) -> nn.Parameter:
    """Return rows of a weight or bias, of a transposed weight its columns, as a parameter."""
    tensor = whole(parameter.detach())
    tensor = tensor.mT if is_transposed else tensor
    kept = tensor[rows.to(tensor.device)].contiguous()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _whole_copy(bias: nn.Parameter) -> nn.Parameter:
    """Return a bias itself, or a whole copy where this process holds a part of it."""
    if not isinstance(bias, DTensor):
        return bias
    return nn.Parameter(whole(bias.detach()), requires_grad=bias.requires_grad)


def _like(factor: Tensor, weight: Tensor) -> nn.Parameter:
    """Return a factor as a parameter of its own, in other respects like the weight it replaces."""
    own = factor.detach().to(
        device=weight.device, dtype=weight.dtype, copy=True, memory_format=torch.contiguous_format
    )
    return nn.Parameter(own, requires_grad=weight.requires_grad)


def _without_factors(model: PreTrainedModel) -> PreTrainedModel:
    """Return what the config alone builds, on the meta device: every linear of its own class."""
    content = model.config.to_dict()
    content.pop("quantization_config", None)
    config = type(model.config).from_dict(content)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return type(model)(config)


def _dense_original(originals: PreTrainedModel, name: str) -> DenseModule:
    linear = originals.get_submodule(name)
    if not isinstance(linear, DenseModule):
        raise ModelError(f"{name} must be a Linear, the config builds {type(linear).__name__}")
    return linear


def _num_parts(
    name: str, narrowed: Mapping[str, NarrowedLinear], dense: Mapping[str, DenseModule]
) -> int | None:
    """Return of how many parts a writer of an MLP's channels consists, None for a reader.

    Shapes tell, of the writer and of a reader in the same module: as often as the writer has all of
    the reader's channels, it must have had all of the original ones.

    Raises:
        ModelError: If no reader is near.
    """
    new, old = narrowed[name].out_features, dense_shape(dense[name])[0]
    if new == old:
        return None
    for other, reader in narrowed.items():
        kept, channels = reader.in_features, dense_shape(dense[other])[1]
        is_near = other.rpartition(".")[0] == name.rpartition(".")[0] and kept < channels
        if is_near and old % channels == 0 and old // channels * kept == new:
            return old // channels
    raise ModelError(
        f"{name} has {new} of {old} outputs, but no linear beside it reads as many channels"
    )


def _padded(narrowed: NarrowedLinear, dense: DenseModule, num_parts: int | None) -> DenseModule:
    """Return the dense module, with zeros where channels were removed."""
    weight, bias = narrowed.weight.detach(), narrowed.bias
    trainable = narrowed.weight.requires_grad
    if num_parts is None:
        full = weight.new_zeros(dense_shape(dense))
        full[:, : weight.shape[1]] = weight
    else:
        full = _padded_parts(weight, dense_shape(dense)[0], num_parts)
        if bias is not None:
            filled = _padded_parts(bias.detach(), dense_shape(dense)[0], num_parts)
            bias = nn.Parameter(filled, requires_grad=bias.requires_grad)
    stored = full.mT.contiguous() if isinstance(dense, Conv1D) else full
    dense.register_parameter("weight", nn.Parameter(stored, requires_grad=trainable))
    dense.register_parameter("bias", bias)
    return dense.train(narrowed.training)


def _padded_parts(tensor: Tensor, num_rows: int, num_parts: int) -> Tensor:
    """Return a weight or bias whose every part has zeros at its end, ``num_rows`` in all."""
    parts = tensor.reshape(num_parts, -1, *tensor.shape[1:])
    full = parts.new_zeros((num_parts, num_rows // num_parts, *tensor.shape[1:]))
    full[:, : parts.shape[1]] = parts
    return full.flatten(0, 1)


def _product(name: str, factors: LowRankLinear, dense: DenseModule) -> DenseModule:
    """Return the dense module, with the product of the factors as its weight."""
    left, right = factors.left.weight.detach(), factors.right.weight.detach()
    wide = torch.promote_types(left.dtype, torch.float32)
    weight = (left.to(wide) @ right.to(wide)).to(left.dtype)  # (N, M)
    # Finite factors can overflow in float16. Values on the meta device cannot be looked at.
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise NumericsError(
            f"the product of the factors of {name} is not finite in {left.dtype}; "
            f"compress with a wider model.dtype"
        )
    stored = weight.mT.contiguous() if isinstance(dense, Conv1D) else weight
    trainable = factors.left.weight.requires_grad
    dense.register_parameter("weight", nn.Parameter(stored, requires_grad=trainable))
    dense.register_parameter("bias", factors.left.bias)
    return dense.train(factors.training)
