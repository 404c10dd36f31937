"""Reads the shapes that memory depends on from a model, which may have no weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grasp_lightning.memory.shapes import Layer, ModelShape
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import READER, narrowed_experts
from grasp_lightning.models.linears import in_attention
from grasp_lightning.models.lowrank import low_rank_linears, narrowed_linears, seams
from grasp_lightning.models.operations import applier_of
from grasp_lightning.models.size import LinearShape, count_parameters, count_tied_parameters
from grasp_lightning.plan import AddSeam, MergeLayers, NarrowExperts, Operation, SetWeights

_INNER_SIZES = 4  # times the hidden size, for layers without linears in their MLP
# Layers of these types keep a state of fixed size, or nothing, instead of keys and values.
_WITHOUT_KEYS = ("linear_attention", "mamba", "conv", "moe", "mlp")


def model_shape(view: DecoderView) -> ModelShape:
    """Return the shape of a model, which may be on the meta device.

    Experts of a mixture count as parameters only; their activations are unknown.
    """
    config: Any = view.model.config.get_text_config()  # Any: each family has a class of its own
    # Mamba and xLSTM have no attention.
    num_heads = getattr(config, "num_attention_heads", None) or 0
    types = getattr(config, "layer_types", None) or [""] * len(view.layer_indices)
    layers = tuple(
        _layer(view, index)._replace(has_keys=num_heads > 0 and kind not in _WITHOUT_KEYS)
        for index, kind in zip(view.layer_indices, types, strict=True)
    )
    inner, is_gated = _widest_mlp(layers, config.hidden_size)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(num_heads, 1)
    return ModelShape(
        parameters=count_parameters(view.model),
        element_size=view.model.dtype.itemsize,
        layers=layers,
        hidden=config.hidden_size,
        queries=num_heads * head_size,
        keys=_num_key_heads(config, num_heads) * head_size,
        num_heads=num_heads,
        inner=inner,
        is_gated=is_gated,
        vocabulary=config.vocab_size,
        is_eager=getattr(view.model.config, "_attn_implementation", None) == "eager",
        tied=count_tied_parameters(view.model),
    )


def shape_after(model: ModelShape, operations: Sequence[Operation], parameters: int) -> ModelShape:
    """Return the shape of a model after operations that leave it this number of parameters."""
    dropped = {index for operation in operations for index in operation.dropped}
    dense = {name: shape for layer in model.layers for name, shape in layer.linears.items()}
    new: dict[str, LinearShape] = {}
    for operation in operations:
        new |= applier_of(operation).new_shapes(operation, dense)
    layers = tuple(
        _with_experts(
            _after(index, layer, new, operations, seam=model.hidden**2), operations, model.hidden
        )
        for index, layer in enumerate(model.layers)
        if index not in dropped
    )
    inner, is_gated = _widest_mlp(layers, model.hidden)
    return replace(model, parameters=parameters, layers=layers, inner=inner, is_gated=is_gated)


def _after(
    index: int,
    layer: Layer,
    new: Mapping[str, LinearShape],
    operations: Sequence[Operation],
    *,
    seam: int,
) -> Layer:
    """Return the shape of a layer with new linears; a seam has this number of parameters."""
    linears = {name: new.get(name, shape) for name, shape in layer.linears.items()}
    before, after = (sum(x.parameters for x in y.values()) for y in (layer.linears, linears))
    replaced = [name for name, shape in linears.items() if shape.is_replaced]
    changed, seams = {f"{name}.bias" for name in replaced}, 0
    for operation in operations:
        if isinstance(operation, SetWeights):
            changed |= {f"{operation.module}.{name}" for name in operation.parameters}
        elif isinstance(operation, MergeLayers) and operation.absorbed:
            changed |= layer.sizes.keys() if operation.base == index else set()
        elif isinstance(operation, AddSeam) and operation.holder == index:
            seams += seam
    changed -= {f"{name}.weight" for name in replaced}
    return layer._replace(
        parameters=layer.parameters - before + after + seams,
        linears=linears,
        rewritten=sum(layer.sizes.get(name, 0) for name in changed) + seams,
    )


def _with_experts(layer: Layer, operations: Sequence[Operation], hidden: int) -> Layer:
    """Return a layer with narrower experts, whose weights count as rewritten."""
    for op in operations:
        reader = f"{op.experts}.{READER}" if isinstance(op, NarrowExperts) else ""
        if isinstance(op, NarrowExperts) and reader in layer.sizes:
            own = (n for name, n in layer.sizes.items() if name.startswith(f"{op.experts}."))
            bias = layer.sizes.get(f"{reader}_bias", 0)
            sizes = sum(own) - bias
            width = layer.sizes[reader] // (len(op.channels) * hidden)
            left = sizes * op.width // width
            layer = layer._replace(
                parameters=layer.parameters - sizes + left,
                rewritten=layer.rewritten + left + bias,
            )
    return layer


def _layer(view: DecoderView, index: int) -> Layer:
    module, prefix = view.layer(index), f"{view.layers_name}.{index}."
    linears = {
        name: LinearShape(linear.out_features, linear.in_features)
        for name, linear in view.linears(index).items()
    }
    for name, low_rank in low_rank_linears(module).items():
        rows, columns = low_rank.out_features, low_rank.in_features
        linears[prefix + name] = LinearShape(rows, columns, low_rank.rank)
    for name, narrowed in narrowed_linears(module).items():
        rows, columns = narrowed.out_features, narrowed.in_features
        linears[prefix + name] = LinearShape(rows, columns, is_narrowed=True)
    attention = [name for name in linears if in_attention(name.removeprefix(prefix))]
    sizes = {prefix + name: p.numel() for name, p in module.named_parameters()}
    rewritten = sum(linear.weight.numel() for linear in seams(module).values())
    rewritten += sum(count_parameters(module.get_submodule(n)) for n in narrowed_experts(module))
    for name, shape in linears.items():
        if shape.is_replaced:
            rewritten += sizes.get(f"{name}.bias", 0) + sizes.get(f"{name}.left.bias", 0)
    return Layer(
        count_parameters(module), linears, tuple(attention), sizes=sizes, rewritten=rewritten
    )


def _widest_mlp(layers: Iterable[Layer], hidden: int) -> tuple[int, bool]:
    """Return the largest inner width of an MLP, and whether that MLP is gated."""
    return max(
        (_mlp(layer.blocks[0], hidden) for layer in layers if layer.blocks[0]),
        default=(_INNER_SIZES * hidden, False),
    )


def _mlp(linears: Sequence[LinearShape], hidden: int) -> tuple[int, bool]:
    # A narrowed MLP may have an inner width below the hidden size.
    readers = [linear.columns for linear in linears if linear.rows == hidden]
    inner = max(readers or [linear.columns for linear in linears])
    projected = sum(x.rows for x in linears if (x.rows, x.columns) != (hidden, inner))
    return inner, projected >= 2 * inner


def _num_key_heads(config: Any, num_heads: int) -> int:  # noqa: ANN401  each family has a class of its own
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    for key in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, key, None) is not None:
            return int(getattr(config, key))
    return num_heads
