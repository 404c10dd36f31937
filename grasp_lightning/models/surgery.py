"""The only module that changes models: it applies the operations of a plan."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.errors import ModelError, NumericsError, PlanError
from grasp_lightning.models.checkpoint import attach_quantizer, foreign_quantizer
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import LowRankLinear, dense_shape, low_rank_linears
from grasp_lightning.models.sharding import is_sharded, shard_like, whole
from grasp_lightning.plan import DropLayers, FactorizeLinear, Operation, SelectLayers


def apply_operations(
    view: DecoderView, operations: Sequence[Operation], tensors: Mapping[str, Tensor]
) -> None:
    """Change a model as a plan says, or not at all if any part of the plan does not fit it.

    A ``PlanError`` says which operation does not fit, or which factor is missing, of another
    shape, or not finite in the dtype of the weight it replaces.

    Args:
        view: The model, changed in place.
        operations: What to do, in order, with names and layer numbers of the original model.
        tensors: Factors of the factorised linears, ``<module>.left`` ``(N, r)`` and
            ``<module>.right`` ``(r, M)`` for a weight ``(N, M)``, any float dtype and device.
            Others are ignored.
    """
    _check_operations(view, operations)
    for operation in operations:
        if isinstance(operation, FactorizeLinear):
            _check_factors(view, operation, tensors)
    for operation in operations:
        match operation:
            case FactorizeLinear():
                _factorize(view, operation, tensors)
            case DropLayers():
                view.drop(operation.layers)
            case SelectLayers():
                pass
    if is_sharded(view.model):
        gc.collect()  # a sharded module and what brings its parts together hold each other
    attach_quantizer(view.model)


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
    ranks, dropped = _check_operations(view, operations)
    gone = {id(module) for index in dropped for module in view.layer(index).modules()}
    linears = [(_dense(view, module), rank) for module, rank in ranks.items()]
    linears = [(linear, rank) for linear, rank in linears if id(linear) not in gone]
    replaced = {id(linear) for linear, _ in linears}
    # By identity, and through every owner: a weight tied to one that stays does not go away.
    kept: dict[int, int] = {}
    for module in view.model.modules():
        if id(module) not in gone:
            for name, parameter in module.named_parameters(recurse=False):
                if id(module) not in replaced or name != "weight":
                    kept[id(parameter)] = parameter.numel()
    factors = sum(rank * sum(dense_shape(linear)) for linear, rank in linears)
    return sum(kept.values()) + factors


def densify(
    model: PreTrainedModel, track: Callable[[Sequence[str]], Iterable[str]] = tuple
) -> tuple[str, ...]:
    """Multiply the factors of every low-rank linear back into one dense weight.

    Each gets back the module of its family, with the bias as it is, so that the model becomes an
    ordinary one of its class, of the size it had before its linears were replaced. Products are
    computed in float32 or better, and have the factors' dtype and device; the meta device will do.
    A ``NumericsError`` names a linear whose product overflows that dtype.

    Args:
        model: A model with low-rank linears, changed in place once all products are finite.
        track: Shows progress: names of the linears -> the same names.

    Returns:
        Full names of the linears that are dense now, sorted.

    Raises:
        ModelError: If the model has no low-rank linears.
    """
    factors = low_rank_linears(model)
    if not factors:
        raise ModelError(
            f"{type(model).__name__} has no low-rank linears, so there are no factors to multiply: "
            f"expected a model whose linears were replaced by compress"
        )
    originals = _without_factors(model)
    products = {
        name: _product(name, factors[name], originals.get_submodule(name))
        for name in track(list(factors))
    }
    for name, dense in products.items():
        model.set_submodule(name, dense)
    attach_quantizer(model)
    return tuple(products)


def _check_operations(
    view: DecoderView, operations: Sequence[Operation]
) -> tuple[dict[str, int], set[int]]:
    """Return the ranks and dropped layers that the operations lead to, without any change."""
    foreign = foreign_quantizer(view.model)
    if foreign is not None:
        raise PlanError(
            f"the model is quantized with {foreign}; expected floating-point weights, so load it "
            f"dequantized and without its quantization state"
        )
    ranks: dict[str, int] = {}
    dropped: set[int] = set()
    for operation in operations:
        match operation:
            case FactorizeLinear():
                _check_factorize(view, operation, ranks, dropped)
                ranks[operation.module] = operation.rank
            case DropLayers():
                _check_droppable(view)
                _check_layers(view, operation.layers, dropped)
                dropped.update(operation.layers)
            case SelectLayers():
                _check_layers(view, operation.layers, dropped)
    if len(dropped) == len(view.layer_indices):
        raise PlanError(f"the plan drops all {len(dropped)} decoder layers: one must be left")
    return ranks, dropped


def _check_droppable(view: DecoderView) -> None:
    try:
        view.check_droppable()
    except ModelError as error:
        raise PlanError(f"the plan drops decoder layers: {error}") from error


def _check_layers(view: DecoderView, layers: Sequence[int], dropped: set[int]) -> None:
    if len(set(layers)) != len(layers):
        raise PlanError(f"the plan names a decoder layer twice in {list(layers)}")
    left = set(view.layer_indices) - dropped
    missing = sorted(set(layers) - left)
    if missing:
        raise PlanError(f"the plan names decoder layers {missing}, the model has {sorted(left)}")


def _check_factorize(
    view: DecoderView, operation: FactorizeLinear, ranks: Mapping[str, int], dropped: set[int]
) -> None:
    module, rank = operation.module, operation.rank
    if module in ranks:
        raise PlanError(f"the plan factorizes {module} twice")
    if any(module.startswith(f"{view.layers_name}.{index}.") for index in dropped):
        raise PlanError(f"the plan factorizes {module} after dropping its decoder layer")
    largest = min(dense_shape(_dense(view, module)))
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


def _check_factors(
    view: DecoderView, operation: FactorizeLinear, tensors: Mapping[str, Tensor]
) -> None:
    linear = _dense(view, operation.module)
    rows, columns = dense_shape(linear)
    shapes = {"left": (rows, operation.rank), "right": (operation.rank, columns)}
    for side, shape in shapes.items():
        key = f"{operation.module}.{side}"
        if key not in tensors:
            raise PlanError(f"factor {key} is missing")
        factor = tensors[key]
        if tuple(factor.shape) != shape:
            raise PlanError(f"factor {key} must have shape {shape}, got {tuple(factor.shape)}")
        # After the cast: what is finite in float32 can overflow in float16.
        if not torch.isfinite(factor.to(linear.weight.dtype)).all():
            raise PlanError(f"factor {key} has values that are not finite in {linear.weight.dtype}")


def _dense(view: DecoderView, module: str) -> DenseModule:
    try:
        linear = view.module(module)
    except ModelError as error:
        raise PlanError(f"the plan factorizes {module}: {error}") from error
    if not isinstance(linear, DenseModule):
        raise PlanError(
            f"the plan factorizes {module}: expected a Linear, the model has "
            f"{type(linear).__name__}"
        )
    index = view.layer_of(module)
    if index is not None and module not in view.dense_modules(index):
        raise PlanError(
            f"the plan factorizes {module}: it is part of a mixture of experts, or of a linear "
            f"that is low-rank already"
        )
    if not linear.weight.is_floating_point():
        raise PlanError(f"weight of {module} must be floating point, got {linear.weight.dtype}")
    return linear


def _factorize(
    view: DecoderView, operation: FactorizeLinear, tensors: Mapping[str, Tensor]
) -> None:
    old = _dense(view, operation.module)
    # On the meta device first: no memory for values that are replaced at once, no random numbers
    # drawn.
    rows, columns = dense_shape(old)
    bias = old.bias is not None
    new = LowRankLinear(columns, rows, operation.rank, bias=bias, device="meta")
    new.left.weight = _like(tensors[f"{operation.module}.left"], old.weight)
    new.right.weight = _like(tensors[f"{operation.module}.right"], old.weight)
    if old.bias is not None:
        new.left.bias = _whole_copy(old.bias)
    shard_like(new, old)
    view.set_module(operation.module, new.train(old.training))


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


def _product(name: str, factors: LowRankLinear, dense: nn.Module) -> nn.Module:
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
