"""Which rows and columns of a checkpoint's linears one process of tensor parallelism holds.

A linear of vLLM can hold several linears of the checkpoint (q, k and v; gate and up), or one linear
of the checkpoint with several outputs (Phi-3). Each linear of the checkpoint is a *part* here.
Parts that are split by outputs keep the whole right factor and some rows of the left one; parts
that are split by inputs keep some columns of the right factor and the whole left one, so that the
sum over processes is right. Pure Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple

Split = Literal["outputs", "inputs", "nothing"]


class Span(NamedTuple):
    """Neighbouring rows or columns of a matrix."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of rows or columns."""
        return self.stop - self.start


class Linear(NamedTuple):
    """A linear of the checkpoint: low-rank if it has a rank, narrowed if it has a shape."""

    module: str
    rank: int | None = None
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense linear of vLLM, before compression.

    Attributes:
        outputs: Its outputs over all processes, by q, k and v, or gate and up.
        inputs: Its inputs over all processes.
        split: What is split over the processes.
        process: Number of this process, from 0.
        num_processes: Number of processes.
        copies: For each of ``outputs``, how many neighbouring processes hold the same share:
            more than one if there are fewer key/value heads than processes.
    """

    outputs: tuple[int, ...]
    inputs: int
    split: Split = "nothing"
    process: int = 0
    num_processes: int = 1
    copies: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """What this process holds of one linear of the checkpoint.

    Attributes:
        module: Its full name.
        shape: (outputs, inputs) in the checkpoint.
        rank: Its rank; None if it is dense or narrowed.
        rows: Its outputs held here.
        columns: Its inputs held here.
    """

    module: str
    shape: tuple[int, int]
    rank: int | None
    rows: tuple[Span, ...]
    columns: Span

    @property
    def num_outputs(self) -> int:
        """Number of outputs held here."""
        return sum(span.size for span in self.rows)

    @property
    def height(self) -> int:
        """Rows of what is applied to the input: the right factor, or the dense matrix."""
        return self.num_outputs if self.rank is None else self.rank


def share(size: int, process: int, num_processes: int) -> Span:
    """Return the share of one process; shares differ by at most one."""
    return Span(size * process // num_processes, size * (process + 1) // num_processes)


def parts_of(layer: Layer, linears: Sequence[Linear]) -> tuple[Part, ...]:
    """Return the part that this process holds of each linear of the checkpoint.

    Args:
        layer: The dense linear of vLLM that holds them.
        linears: One per output of the layer, or one with all of its outputs.

    Raises:
        ValueError: If the linears do not fit the layer.
    """
    if len(linears) not in {1, len(layer.outputs)}:
        names = ", ".join(linear.module for linear in linears)
        raise ValueError(f"{names}: expected {len(layer.outputs)} linears, got {len(linears)}")
    copies = layer.copies or (1,) * len(layer.outputs)
    is_fused = len(linears) < len(layer.outputs)
    parts = []
    for i, linear in enumerate(linears):
        chosen = slice(None) if is_fused else slice(i, i + 1)
        outputs, inputs = _sizes(linear, layer.outputs[chosen], layer.inputs)
        rows, start = [], 0
        for size, same in zip(outputs, copies[chosen], strict=True):
            span = _share_of(layer, "outputs", size, same)
            rows.append(Span(start + span.start, start + span.stop))
            start += size
        columns = _share_of(layer, "inputs", inputs)
        parts.append(
            Part(
                module=linear.module,
                shape=(sum(outputs), inputs),
                rank=linear.rank,
                rows=tuple(rows),
                columns=columns,
            )
        )
    if len({part.columns for part in parts}) > 1:
        raise ValueError(f"{parts[0].module}: the linears beside it have other numbers of inputs")
    return tuple(parts)


def allowed_sizes(heads: int, kv_heads: int, width: int) -> list[int]:
    """Return the tensor-parallel sizes that vLLM can split a model into.

    Args:
        heads: Attention heads, which must split evenly.
        kv_heads: Key/value heads, which must split evenly, or be copied as often each.
        width: Hidden channels of the dense model's MLPs, which must split evenly. Narrowed MLPs
            can split unevenly.
    """
    both = gcd(heads, width)
    divisors = [n for n in range(1, both + 1) if both % n == 0]
    return [n for n in divisors if kv_heads % n == 0 or n % kv_heads == 0]


def _share_of(layer: Layer, dimension: Split, size: int, copies: int = 1) -> Span:
    if layer.split != dimension:
        return Span(0, size)
    return share(size, layer.process // copies, layer.num_processes // copies)


def _sizes(linear: Linear, dense: tuple[int, ...], inputs: int) -> tuple[tuple[int, ...], int]:
    """Return the outputs and the number of inputs of a linear in the checkpoint."""
    if linear.shape is None:
        return dense, inputs
    rows, columns = linear.shape
    # A fused gate and up lose the same channels.
    outputs = tuple(size * rows // sum(dense) for size in dense)
    if sum(outputs) != rows or rows > sum(dense) or columns > inputs:
        raise ValueError(
            f"{linear.module}: shape {rows} x {columns} does not fit a dense linear of "
            f"{sum(dense)} x {inputs}"
        )
    return outputs, columns
