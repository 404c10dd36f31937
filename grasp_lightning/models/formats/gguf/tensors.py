"""The tensors of a GGUF file, named and laid out as llama.cpp expects."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from grasp_lightning.models.formats.gguf.layout import Layout, adds_nothing, layers_of
from grasp_lightning.models.lowrank import is_low_rank

_QKV: Final = {
    "q_proj": MODEL_TENSOR.ATTN_Q,
    "k_proj": MODEL_TENSOR.ATTN_K,
    "v_proj": MODEL_TENSOR.ATTN_V,
}
_NORMS: Final = {"q_norm": MODEL_TENSOR.ATTN_Q_NORM, "k_norm": MODEL_TENSOR.ATTN_K_NORM}
_WRITERS: Final = {"gate_proj": MODEL_TENSOR.FFN_GATE, "up_proj": MODEL_TENSOR.FFN_UP}


class Entry(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: Its name in the file.
        shape: Its shape, rows first.
        build: Computes it, in float32; the only part that reads weights.
        is_output: Whether it gives the logits.
    """

    name: str
    shape: tuple[int, ...]
    build: Callable[[], Tensor]
    is_output: bool = False


def entries(model: PreTrainedModel, layout: Layout) -> Iterator[Entry]:
    """Yield all tensors of a model; on the meta device, all but ``build`` works."""
    body: Any = model.model  # Any: as in layers_of
    config = model.config
    is_tied = config.tie_word_embeddings
    yield _plain(MODEL_TENSOR.TOKEN_EMBD, body.embed_tokens.weight)._replace(is_output=is_tied)
    yield _plain(MODEL_TENSOR.OUTPUT_NORM, body.norm.weight)
    if not is_tied:
        yield _plain(MODEL_TENSOR.OUTPUT, model.get_parameter("lm_head.weight"))._replace(
            is_output=True
        )
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = partial(llama3_factors, config)
        yield Entry(_name(MODEL_TENSOR.ROPE_FREQS), (head_size(config) // 2,), factors)
    for index, layer in enumerate(layers_of(model)):
        if layout.heads[index]:
            yield _plain(MODEL_TENSOR.ATTN_NORM, layer.input_layernorm.weight, index)
            yield from _attention(layer.self_attn, layout, index)
        yield _plain(MODEL_TENSOR.FFN_NORM, layer.post_attention_layernorm.weight, index)
        yield from _mlp(layer.mlp, layout.widths[index], index)


def head_size(config: PreTrainedConfig) -> int:
    """Return the number of values of an attention head."""
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def llama3_factors(config: PreTrainedConfig) -> Tensor:
    """Return the divisors of the rotary frequencies of Llama 3, ``(head size / 2,)``.

    Source: ``_compute_llama3_parameters`` of transformers, whose frequencies they turn the usual
    ones into; llama.cpp reads them from the file.
    """
    rope = config.rope_parameters
    steps = torch.arange(0, head_size(config), 2, dtype=torch.float64) / head_size(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** steps
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clamp(0, 1)  # 0: long waves, wholly divided; 1: short ones, unchanged
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def _attention(attention: Any, layout: Layout, index: int) -> Iterator[Entry]:  # noqa: ANN401  a module of four families
    linears = {name: attention.get_submodule(name) for name in _QKV}
    if layout.architecture.fuses_qkv:
        shape = (
            sum(linear.out_features for linear in linears.values()),
            attention.q_proj.in_features,
        )
        yield Entry(_name(MODEL_TENSOR.ATTN_QKV, index), shape, partial(_joined, linears))
    else:
        heads = {"q_proj": layout.heads[index], "k_proj": layout.key_value_heads[index]}
        turns = layout.architecture.pairs_neighbours
        for name, linear in linears.items():
            pairs = turns and name in heads
            change = partial(_neighbours, num_heads=heads[name]) if pairs else _same
            yield from _linear(_QKV[name], linear, index, change)
    for name, tensor in _NORMS.items():
        if hasattr(attention, name):
            yield _plain(tensor, attention.get_submodule(name).weight, index)
    yield from _linear(MODEL_TENSOR.ATTN_OUT, attention.o_proj, index)


def _mlp(mlp: Any, width: int, index: int) -> Iterator[Entry]:  # noqa: ANN401  a module of four families
    # The channels of a removed MLP are not needed: one block of zeros stands for them.
    change = _zeros if adds_nothing(mlp.down_proj) else _filled
    size = mlp.down_proj.out_features
    for name, tensor in _WRITERS.items():
        fill = partial(change, shape=(width, size))
        yield from _linear(tensor, mlp.get_submodule(name), index, fill, shape=(width, size))
    fill = partial(change, shape=(size, width))
    yield from _linear(MODEL_TENSOR.FFN_DOWN, mlp.down_proj, index, fill, shape=(size, width))


def _linear(
    tensor: MODEL_TENSOR,
    linear: Any,  # noqa: ANN401  dense, narrowed or low-rank
    index: int,
    change: Callable[[Tensor], Tensor] | None = None,
    *,
    shape: tuple[int, int] | None = None,
) -> Iterator[Entry]:
    """Yield weight and bias of a linear, both changed in the same way."""
    change = change or _same
    rows, columns = shape or (linear.out_features, linear.in_features)
    yield Entry(
        _name(tensor, index), (rows, columns), partial(_changed, change, partial(_weight, linear))
    )
    if linear.bias is not None:
        build = partial(_changed, change, partial(_values, linear.bias))
        yield Entry(_name(tensor, index, "bias"), (rows,), build)


def _plain(tensor: MODEL_TENSOR, parameter: Tensor, index: int | None = None) -> Entry:
    return Entry(_name(tensor, index), tuple(parameter.shape), partial(_values, parameter))


def _name(tensor: MODEL_TENSOR, index: int | None = None, part: str = "weight") -> str:
    return f"{TENSOR_NAMES[tensor].format(bid=index)}.{part}"


def _changed(change: Callable[[Tensor], Tensor], build: Callable[[], Tensor]) -> Tensor:
    return change(build())


def _values(parameter: Tensor) -> Tensor:
    return parameter.detach().float()


def _weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear in float32; factors are multiplied in it."""
    module: Any = linear  # Any: as above
    if is_low_rank(linear):
        return _values(module.left.weight) @ _values(module.right.weight)
    return _values(module.weight)


def _joined(linears: Mapping[str, nn.Module]) -> Tensor:
    return torch.cat([_weight(linear) for linear in linears.values()])


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _neighbours(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head: its halves, which turn together, become neighbours."""
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a weight, or a bias of its rows, with zeros at the ends."""
    missing = [new - old for new, old in zip(shape, tensor.shape, strict=False)]
    return pad(tensor, [amount for more in reversed(missing) for amount in (0, more)])


def _zeros(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.new_zeros(shape[: tensor.ndim])
