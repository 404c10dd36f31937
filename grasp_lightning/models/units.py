"""Parts of a decoder layer that are removed as a whole: MLP channels and key/value groups.

A hidden channel of an MLP is one row of each part of the linears that write it, and one column of
the linear that reads it. A key/value group of an attention is one key head, one value head and all
query heads that read them: rows of q, k and v, and columns of the output projection. No weight
belongs to two units.

Legend: N outputs and M inputs of a linear; U units of a block.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseLinear, as_linear
from grasp_lightning.models.lowrank import narrowed_linears
from grasp_lightning.models.mlp import mlps

# Attention that views its projections as heads of one size, however many there are. A family is
# added once its code was read: shapes do not show how it uses its heads.
ATTENTIONS: Final = (
    "Gemma2Attention",
    "Gemma3Attention",
    "GraniteAttention",
    "LlamaAttention",
    "MistralAttention",
    "Phi3Attention",
    "Qwen2Attention",
    "Qwen3Attention",
)
_SEPARATE, _FUSED, _OUTPUT = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",), "o_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """The units of one block.

    Attributes:
        reader: Full name of the linear that reads them.
        writers: Full names of the linears that write them, in module order.
        parts: For each writer, the rows of one unit in each of its parts: a fused linear has
            several parts, one after the other.
        width: Columns of the reader per unit.
        number: U.
        size: Parameters of one unit, biases of writers included.
        are_heads: Whether they are key/value groups of an attention, not channels of an MLP.
    """

    reader: str
    writers: tuple[str, ...]
    parts: tuple[tuple[int, ...], ...]
    width: int
    number: int
    size: int
    are_heads: bool

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of all linears of the block."""
        return (self.reader, *self.writers)

    def rows(self, writer: str, units: Sequence[int]) -> Tensor:
        """Return the rows of a writer that belong to some units, part by part."""
        parts = self.parts[self.writers.index(writer)]
        return part_rows(parts, self.number, units)

    def columns(self, units: Sequence[int]) -> Tensor:
        """Return the columns of the reader that belong to some units."""
        return part_rows((self.width,), self.number, units)


def part_rows(parts: Iterable[int], number: int, units: Sequence[int]) -> Tensor:
    """Return the rows of some units in a matrix of several parts, int64.

    Args:
        parts: Rows of one unit in each part.
        number: Number of units.
        units: Their indices, in the order of the result.
    """
    found, start, chosen = [], 0, torch.tensor(list(units), dtype=torch.int64)
    for size in parts:
        found.append((start + chosen[:, None] * size + torch.arange(size)).flatten())
        start += number * size
    return torch.cat(found)


def channel_units(view: DecoderView, index: int) -> Units | None:
    """Return the channels of a layer's MLP; None if they cannot be removed one by one.

    The weights may be on the meta device.
    """
    linears = view.linears(index)
    for mlp in mlps(view, index):
        number = linears[mlp.reader].in_features
        parts = tuple((1,) * (linears[name].out_features // number) for name in mlp.writers)
        return _units(linears, mlp.reader, mlp.writers, parts, width=1, number=number)
    return None


def head_units(view: DecoderView, index: int) -> Units | None:
    """Return the key/value groups of a layer's attention; None if its heads cannot be removed.

    The weights may be on the meta device.
    """
    for child, attention in view.layer(index).named_children():
        prefix = f"{view.layers_name}.{index}.{child}"
        linears = {name: as_linear(m) for name, m in view.dense_modules(index).items()}
        kind = type(attention).__name__
        inputs = _FUSED if hasattr(attention, _FUSED[0]) else _SEPARATE
        reader, writers = f"{prefix}.{_OUTPUT}", tuple(f"{prefix}.{name}" for name in inputs)
        if kind not in ATTENTIONS or not linears.keys() >= {reader, *writers}:
            continue
        columns, rows = linears[reader].in_features, linears[writers[0]].out_features
        size = head_size(attention)
        fused = (rows - columns) // 2
        number = (fused if inputs == _FUSED else linears[writers[1]].out_features) // size
        width = columns // number
        parts = ((width, size, size),) if inputs == _FUSED else ((width,), (size,), (size,))
        return _units(linears, reader, writers, parts, width=width, number=number, are_heads=True)
    return None


def has_fewer_heads(model: nn.Module) -> bool:
    """Return whether compression has removed heads, so that layers may have different numbers."""
    linears = (*_SEPARATE, *_FUSED, _OUTPUT)
    return any(name.rpartition(".")[2] in linears for name in narrowed_linears(model))


def heads_problem(view: DecoderView, index: int) -> str | None:
    """Return in one line why heads of a layer cannot be removed; None if they can."""
    if head_units(view, index) is not None:
        return None
    known = ", ".join(name.removesuffix("Attention") for name in ATTENTIONS)
    return (
        f"the attention heads of decoder layer {index} of {type(view.model).__name__} cannot be "
        f"removed: expected the dense attention of one of the families {known}"
    )


def head_size(attention: nn.Module) -> int:
    """Return the number of values of an attention head."""
    size: Any = attention.head_dim  # Any: attributes of modules have no type
    return int(size)


def _units(
    linears: dict[str, DenseLinear],
    reader: str,
    writers: tuple[str, ...],
    parts: tuple[tuple[int, ...], ...],
    *,
    width: int,
    number: int,
    are_heads: bool = False,
) -> Units:
    written = sum(
        sum(sizes) * (linears[name].in_features + (linears[name].bias is not None))
        for name, sizes in zip(writers, parts, strict=True)
    )
    return Units(
        reader=reader,
        writers=writers,
        parts=parts,
        width=width,
        number=number,
        size=written + width * linears[reader].out_features,
        are_heads=are_heads,
    )
