"""Memory of one calibration process, from shapes alone.

Weights, decompositions and factors are exact; ``activations`` explains the estimate of activations.

Legend: a linear has N outputs, M inputs and K = min(N, M) singular components; r is a rank; T
tokens per window; D hidden size, I inner width of the MLP; e bytes per element of a weight, c of a
computed value.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from grasp_lightning.linalg.row_groups import CHUNK as ROW_CHUNK
from grasp_lightning.linalg.row_groups import group_sizes
from grasp_lightning.memory.activations import (
    FLOAT32,
    FLOAT64,
    computed_size,
    evaluation_bytes,
    forward_bytes,
    head_bytes,
    layer_bytes,
)
from grasp_lightning.memory.shapes import ModelShape, Pass, Scored, part_of
from grasp_lightning.models.size import LinearShape
from grasp_lightning.stats.vocabulary import CHUNK

# FSDP2 gathers weights into a buffer, then copies them out of it.
FSDP_COPIES = 2


class CalibrationMemory(NamedTuple):
    """Bytes that one calibration process needs.

    Attributes:
        weights: The model, or this process's shard of it.
        statistics: Decompositions of weights, and sums of scores.
        factors: Factors in float32, or weights of equal shape in the type of the model.
        activations: Peak of a forward and backward pass, or of one decomposition or update of a
            weight if that is larger.
        cache: Hidden states kept between passes.
    """

    weights: int
    statistics: int
    factors: int
    activations: int
    cache: int

    @property
    def total(self) -> int:
        """All bytes: slightly more than the peak, since the factors come last."""
        return sum(self)


def calibration_memory(
    model: ModelShape,
    replaced: Iterable[LinearShape],
    run: Pass,
    scored: Scored,
    *,
    num_parts: int = 1,
    cache: int = 0,
    set_weights: int = 0,
) -> CalibrationMemory:
    """Return what one calibration process needs.

    Args:
        replaced: The linears that are replaced, with their ranks.
        num_parts: Number of FSDP shards of the weights. A process holds tied weights, its shard,
            and one gathered matrix at a time with its buffer. Statistics are never sharded.
        cache: Bytes of hidden states kept between passes.
        set_weights: Bytes of weights that replace others of equal shape.
    """
    weights = model.weights
    if num_parts > 1:
        tied = model.tied * model.element_size
        weights = tied + part_of(weights - tied, num_parts) + FSDP_COPIES * model.largest_split
    # Saving packs the moments into a copy of half their size.
    statistics = scored.moments * 3 // 2
    if scored.rows:  # a pass of its own, after those of the moments
        statistics = max(statistics, vocabulary_bytes(model.vocabulary, model.hidden))
    statistics += training_bytes(scored.trained, model.element_size)
    if scored.has_bases:
        statistics += bases_bytes(scored.linears, model.element_size)
    if scored.lowest is not None and (scored.has_bases or scored.sums_gradients):
        sums = sums_bytes(scored.linears, sums_gradients=scored.sums_gradients)
        statistics += scored.num_sums * sums
    decomposition = max((decomposition_bytes(linear) for linear in scored.linears), default=0)
    updates = (row_update_bytes(shape, model.element_size) for shape in scored.rows)
    decomposition = max(decomposition, scored.update, *updates)
    activations = calibration_activations(model, run, scored)
    if scored.rows:
        activations = max(activations, vocabulary_activations(model, run))
    return CalibrationMemory(
        weights=weights,
        statistics=statistics,
        # Of rows at most, with as many values as they have.
        factors=factors_bytes(replaced) + set_weights + FLOAT32 * sum(map(prod, scored.rows)),
        activations=max(activations, decomposition),
        cache=cache,
    )


def calibration_activations(model: ModelShape, run: Pass, scored: Scored) -> int:
    """Return the peak of a calibration pass besides weights and statistics, in bytes.

    From the lowest scored layer up, autograd keeps ``layer_bytes``. Each scored layer also holds
    the inputs of its linears, ``(2 D + I) c`` per token (autograd keeps that of the output
    projection already). Added to that are the logits, or the gradients of one MLP and the scoring
    of one window, whichever is larger. A single trained layer keeps ``layer_bytes``.
    """
    computed = computed_size(model, run)
    if scored.lowest is None:
        if scored.has_logits:
            return evaluation_bytes(model, run)
        return forward_bytes(model, run) + bool(scored.trained) * layer_bytes(model, run)
    kept = (len(model.layers) - scored.lowest) * layer_bytes(model, run)
    held = run.num_tokens * (2 * model.hidden + model.inner) * computed
    scoring = max(
        window_bytes(linear, run.seqlen, is_full=scored.is_full) for linear in scored.linears
    )
    backward = run.num_tokens * (3 * model.inner + 2 * model.hidden) * computed + scoring
    return kept + scored.num_layers * held + max(head_bytes(model, run), backward)


def vocabulary_bytes(vocabulary: int, hidden: int) -> int:
    """Return the bytes of the sums at embedding and head, and of their means.

    G groups of tokens have two Gram matrices each, in sums and in means: ``16 G D^2`` bytes. Each
    token has one sum, one mean, a frequency, and its place among the groups: ``(4 G + 20) V``. In
    float64 it has a count, and at the end its sum and its place: ``(8 G + 16) V``.
    """
    num_groups = len(group_sizes(vocabulary, 0))
    grams = 2 * FLOAT32 * num_groups * hidden**2
    places = (FLOAT32 + FLOAT64) * num_groups + 3 * FLOAT32 + 3 * FLOAT64
    return 2 * grams + places * vocabulary


def vocabulary_activations(model: ModelShape, run: Pass) -> int:
    """Return the peak of the pass that prices rows, besides weights and sums, in bytes.

    Autograd keeps ``layer_bytes`` of all layers, and the embedded tokens. The squares of a few rows
    of logits come on top.
    """
    kept = len(model.layers) * layer_bytes(model, run)
    embedded = run.num_tokens * model.hidden * 2 * computed_size(model, run)
    return kept + embedded + head_bytes(model, run) + 2 * FLOAT32 * CHUNK * model.vocabulary


def row_update_bytes(shape: tuple[int, int], element_size: int) -> int:
    """Return what the factors of one group of rows need, with at most as many values as its rows.

    In float64: the left factor and a copy of it, or a few rows and their weighted copy; and six
    matrices of the hidden size. Besides these, the rows themselves.
    """
    rows, hidden = shape
    rank = rows * hidden // (rows + hidden)
    largest = 2 * max(rows * rank, min(rows, ROW_CHUNK) * hidden)
    return FLOAT64 * (largest + 6 * hidden**2) + element_size * rows * hidden


def bases_bytes(linears: Iterable[LinearShape], element_size: int = FLOAT32) -> int:
    """Return the bytes of U, s and V of dense linears, each ``(N K + K + K M) max(e, 4)``."""
    size = max(element_size, FLOAT32)
    return sum(x.num_components * (x.rows + 1 + x.columns) * size for x in linears)


def training_bytes(parameters: int, element_size: int) -> int:
    """Return the bytes of the training of one layer besides the layer itself, ``20 + e`` each.

    In float32: weights, gradients, two moments of AdamW and the best weights; and the weights in
    the type of the model.
    """
    return parameters * (5 * FLOAT32 + element_size)


def sums_bytes(linears: Iterable[LinearShape], *, sums_gradients: bool) -> int:
    """Return the bytes of the sums over windows.

    Each linear takes ``4 N M`` if its gradient is summed, else ``8 K`` for one score per component.
    """
    if sums_gradients:
        return sum(FLOAT32 * linear.rows * linear.columns for linear in linears)
    return sum(FLOAT64 * linear.num_components for linear in linears)


def factors_bytes(linears: Iterable[LinearShape]) -> int:
    """Return the float32 bytes of the factors and narrowed weights that replace linears.

    Each low-rank linear takes ``4 r (N + M)``, each narrowed one ``4 N M``, a dense one nothing.
    """
    return sum(FLOAT32 * linear.parameters for linear in linears if linear.is_replaced)


def decomposition_bytes(linear: LinearShape) -> int:
    """Return what the decomposition of a dense linear needs besides its result.

    LAPACK's gesdd copies the weight and needs a workspace of at least ``4 K^2 + 7 K``; U and V are
    copied once: ``4 (N M + N K + K M + 4 K^2 + 7 K)`` bytes.
    """
    rank = linear.num_components
    copies = linear.rows * linear.columns + rank * (linear.rows + linear.columns)
    return FLOAT32 * (copies + 4 * rank**2 + 7 * rank)


def update_bytes(linear: LinearShape) -> int:
    """Return what the update of one weight by SparseGPT needs, ``8 (4 M^2 + 2 N M)``.

    In float64: the Gram matrix, its factor, its inverse and the factor of that; and two weights.
    """
    return FLOAT64 * (4 * linear.columns**2 + 2 * linear.rows * linear.columns)


def window_bytes(linear: LinearShape, seqlen: int, *, is_full: bool) -> int:
    """Return the temporary float32 bytes of scoring one window of one linear.

    With few tokens, inputs and gradients are projected to ``(T, K)`` each; otherwise the weight
    gradient ``(N, M)`` is formed. If ``is_full``, the scores of u and v also need ``G V`` and
    ``U^T G``, and the products and moduli of the larger one.
    """
    rank, rows, columns = linear.num_components, linear.rows, linear.columns
    inputs = seqlen * (rows + columns)
    projected = min(2 * seqlen * rank, rows * columns)
    if not is_full:
        return FLOAT32 * (inputs + projected)
    products = rank * (rows + columns) + 2 * rank * max(rows, columns)
    return FLOAT32 * (inputs + projected + products)
