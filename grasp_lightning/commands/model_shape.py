"""What memory depends on, read from a model that may have no weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grasp_lightning.evaluation.footprint import Layer, LinearShape, ModelShape
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import low_rank_linears
from grasp_lightning.models.size import count_parameters, count_tied_parameters
from grasp_lightning.plan import DropLayers, FactorizeLinear, Operation

_INNER_SIZES = 4  # times the hidden size, where no linear tells


def model_shape(view: DecoderView) -> ModelShape:
    """Return the shape of a model, on the meta device or not.

    Experts of a mixture count as parameters; their activations are not known.

    Args:
        view: The model, with all its layers.

    Returns:
        Its shape.
    """
    config: Any = view.model.config.get_text_config()  # Any: each family has a class of its own
    layers = tuple(_layer(view, index) for index in view.layer_indices)
    inner, is_gated = _mlp(layers[0], config.hidden_size)
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return ModelShape(
        parameters=count_parameters(view.model),
        element_size=view.model.dtype.itemsize,
        layers=layers,
        hidden=config.hidden_size,
        queries=num_heads * head_size,
        keys=_num_key_heads(config) * head_size,
        num_heads=num_heads,
        inner=inner,
        is_gated=is_gated,
        vocabulary=config.vocab_size,
        is_eager=getattr(view.model.config, "_attn_implementation", None) == "eager",
        tied=count_tied_parameters(view.model),
    )


def shape_after(model: ModelShape, operations: Sequence[Operation], parameters: int) -> ModelShape:
    """Return the shape of a model after operations.

    Args:
        model: The model before.
        operations: What is done.
        parameters: Number of all parameters after it.

    Returns:
        The shape: layers gone, linears of lower rank.
    """
    dropped = {i for op in operations if isinstance(op, DropLayers) for i in op.layers}
    ranks = {op.module: op.rank for op in operations if isinstance(op, FactorizeLinear)}
    layers = [layer for index, layer in enumerate(model.layers) if index not in dropped]
    return replace(
        model, parameters=parameters, layers=tuple(_with_ranks(layer, ranks) for layer in layers)
    )


def _with_ranks(layer: Layer, ranks: dict[str, int]) -> Layer:
    linears = {
        name: linear._replace(rank=ranks.get(name, linear.rank))
        for name, linear in layer.linears.items()
    }
    before, after = (sum(x.parameters for x in y.values()) for y in (layer.linears, linears))
    return layer._replace(parameters=layer.parameters - before + after, linears=linears)


def _layer(view: DecoderView, index: int) -> Layer:
    module, prefix = view.layer(index), f"{view.layers_name}.{index}."
    linears = {
        name: LinearShape(linear.out_features, linear.in_features)
        for name, linear in view.linears(index).items()
    }
    linears |= {
        prefix + name: LinearShape(low_rank.out_features, low_rank.in_features, low_rank.rank)
        for name, low_rank in low_rank_linears(module).items()
    }
    # As ``methods.blocks`` tells them, with low-rank linears among them.
    attention = [n for n in linears if "att" in n.removeprefix(prefix).split(".")[0].lower()]
    return Layer(count_parameters(module), linears, tuple(attention))


def _mlp(layer: Layer, hidden: int) -> tuple[int, bool]:
    """Return the inner width of the MLP, and whether it is gated."""
    linears = layer.blocks[0]
    inner = max((linear.columns for linear in linears), default=_INNER_SIZES * hidden)
    projected = sum(linear.rows for linear in linears if linear.columns != inner)
    return inner, projected >= 2 * inner


def _num_key_heads(config: Any) -> int:  # noqa: ANN401  each family has a class of its own
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    for key in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, key, None) is not None:
            return int(getattr(config, key))
    return int(config.num_attention_heads)
