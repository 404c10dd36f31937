"""How much memory a process of calibration needs, from shapes alone.

Weights, decompositions and factors are counted to the byte; ``activations`` says how
activations are estimated.

Legend: N output and M input features of a linear, K = min(N, M) singular components, r a rank;
T tokens per window; D hidden size, I inner width of the MLP; e bytes per element of a weight, c of
what is computed.
"""

from collections.abc import Iterable
from typing import NamedTuple

from grasp_lightning.memory.activations import (
    FLOAT32,
    FLOAT64,
    computed_size,
    forward_bytes,
    head_bytes,
    layer_bytes,
)
from grasp_lightning.memory.shapes import ModelShape, Pass, Scored, part_of
from grasp_lightning.models.size import LinearShape

# FSDP2 gathers weights in a buffer, and copies them out of it.
FSDP_COPIES = 2


class CalibrationMemory(NamedTuple):
    """Bytes that one process of a calibration needs.

    Attributes:
        weights: The model, or this process's part of it.
        statistics: Decompositions of weights, and sums of scores.
        factors: Factors in float32; those in the model take the place of what they replace.
        activations: What a forward and a backward pass add, or, if that is more, one decomposition.
        cache: Hidden states kept between passes.
    """

    weights: int
    statistics: int
    factors: int
    activations: int
    cache: int

    @property
    def total(self) -> int:
        """Bytes of all: a little more than at any one moment, since factors come last."""
        return sum(self)


def calibration_memory(
    model: ModelShape,
    replaced: Iterable[LinearShape],
    run: Pass,
    scored: Scored,
    *,
    num_parts: int = 1,
    cache: int = 0,
) -> CalibrationMemory:
    """Return what one process of a calibration needs.

    Args:
        model: The dense model.
        replaced: The linears that are replaced, with their ranks.
        run: Windows of one forward pass.
        scored: What is scored.
        num_parts: Number of processes that the weights are dealt out to (fsdp): each holds what is
            tied, a part of the rest, and one whole matrix at a time with the buffer in which it was
            gathered. Statistics are whole in every process.
        cache: Bytes of hidden states kept between passes.

    Returns:
        Bytes by kind.
    """
    # Moments are packed when they are saved: half as much again.
    statistics = scored.moments * 3 // 2
    if scored.has_bases:
        statistics += bases_bytes(scored.linears, model.element_size)
    if scored.has_bases and scored.lowest is not None:
        statistics += sums_bytes(scored.linears, sums_gradients=scored.sums_gradients)
    decomposition = max((decomposition_bytes(linear) for linear in scored.linears), default=0)
    return CalibrationMemory(
        weights=_split_linears(model, num_parts),
        statistics=statistics,
        factors=factors_bytes(replaced),
        activations=max(calibration_activations(model, run, scored), decomposition),
        cache=cache,
    )


def calibration_activations(model: ModelShape, run: Pass, scored: Scored) -> int:
    """Return what a pass of calibration needs beside weights and statistics, at its peak.

    From the lowest scored layer up autograd keeps ``layer_bytes``; of every scored layer the inputs
    of its linears are held, ``(2 D + I) c`` per token (that of the output projection is kept
    already). On top of them come the logits, or the gradients of one layer's MLP and the scoring of
    a window, whichever is more.

    Args:
        model: The dense model.
        run: Windows of one forward pass.
        scored: What is scored.

    Returns:
        Bytes.
    """
    computed = computed_size(model, run)
    if scored.lowest is None:
        return forward_bytes(model, run)
    kept = (len(model.layers) - scored.lowest) * layer_bytes(model, run)
    held = run.num_tokens * (2 * model.hidden + model.inner) * computed
    scoring = max(
        window_bytes(linear, run.seqlen, is_full=scored.is_full) for linear in scored.linears
    )
    backward = run.num_tokens * (3 * model.inner + 2 * model.hidden) * computed + scoring
    return kept + scored.num_layers * held + max(head_bytes(model, run), backward)


def bases_bytes(linears: Iterable[LinearShape], element_size: int = FLOAT32) -> int:
    """Return the size of the decompositions of dense linears: U, s and V of each.

    Args:
        linears: The linears.
        element_size: e; decompositions are in float32 or better.

    Returns:
        ``(N K + K + K M) max(e, 4)`` of each.
    """
    size = max(element_size, FLOAT32)
    return sum(x.num_components * (x.rows + 1 + x.columns) * size for x in linears)


def sums_bytes(linears: Iterable[LinearShape], *, sums_gradients: bool) -> int:
    """Return the size of what is summed over windows.

    Args:
        linears: The scored linears.
        sums_gradients: Whether the gradient of each weight is summed.

    Returns:
        Per linear ``4 N M``, or ``8 K`` for one score per component.
    """
    if sums_gradients:
        return sum(FLOAT32 * linear.rows * linear.columns for linear in linears)
    return sum(FLOAT64 * linear.num_components for linear in linears)


def factors_bytes(linears: Iterable[LinearShape]) -> int:
    """Return the size of what replaces linears in float32: factors, and narrowed weights.

    Args:
        linears: The linears; dense ones count nothing.

    Returns:
        ``4 r (N + M)`` of each low-rank one, ``4 N M`` of each narrowed one.
    """
    return sum(FLOAT32 * linear.parameters for linear in linears if linear.is_replaced)


def decomposition_bytes(linear: LinearShape) -> int:
    """Return what one decomposition needs beside its result.

    LAPACK's gesdd works on a copy of the weight, in a workspace of at least ``4 K^2 + 7 K``, and
    its U and V are copied once.

    Args:
        linear: A dense linear.

    Returns:
        ``4 (N M + N K + K M + 4 K^2 + 7 K)``.
    """
    rank = linear.num_components
    copies = linear.rows * linear.columns + rank * (linear.rows + linear.columns)
    return FLOAT32 * (copies + 4 * rank**2 + 7 * rank)


def window_bytes(linear: LinearShape, seqlen: int, *, is_full: bool) -> int:
    """Return what scoring one window of one linear needs for a moment, in float32.

    Where tokens are few, inputs and gradients are projected, ``(T, K)`` each; else the gradient of
    the weight is formed, ``(N, M)``. Scores of u and v take ``G V`` and ``U^T G``, and products and
    moduli of the larger one.

    Args:
        linear: The linear.
        seqlen: T.
        is_full: Whether u and v are scored.

    Returns:
        Bytes.
    """
    rank, rows, columns = linear.num_components, linear.rows, linear.columns
    inputs = seqlen * (rows + columns)
    projected = min(2 * seqlen * rank, rows * columns)
    if not is_full:
        return FLOAT32 * (inputs + projected)
    products = rank * (rows + columns) + 2 * rank * max(rows, columns)
    return FLOAT32 * (inputs + projected + products)


def _split_linears(model: ModelShape, parts: int) -> int:
    """Return what a process holds of a model whose linears are split one by one."""
    if parts == 1:
        return model.weights
    tied = model.tied * model.element_size
    return tied + part_of(model.weights - tied, parts) + FSDP_COPIES * model.largest_split
