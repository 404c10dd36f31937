"""How much memory a process of calibration or of compensation needs, from shapes alone.

Weights, decompositions, factors, gradients and optimizer states are counted to the byte.
Activations are what autograd keeps of a decoder layer of the Llama kind (two RMS norms, attention
that never forms its matrix of scores, an MLP that is gated or not), and the largest of what comes
and goes beside it. Interpreter, libraries and what a device's driver takes are not in any number.

Legend: N output and M input features of a linear, K = min(N, M) singular components, r a rank;
B windows of T tokens per forward pass; D hidden size, Q and G widths of all queries and of all
keys, I inner width of the MLP, V words; e bytes per element of a weight, c of what is computed
(2 under bf16-mixed); t trained parameters.
"""

from collections.abc import Iterable
from typing import NamedTuple

from grasp_lightning.config import Strategy
from grasp_lightning.memory.shapes import Adapters, ModelShape, Pass, Scored
from grasp_lightning.models.size import LinearShape

FLOAT32 = 4
FLOAT64 = 8
HALF = 2
# What the loss makes of a few rows of logits at a time: as they are, in float32, as probabilities.
LOSS_PARTS = 3 * FLOAT32 * 2**20
# When DDP starts, it sends the weights in copies of 250 MiB, two of them at a time.
DDP_COPIES = 2 * 250 * 2**20
# FSDP2 gathers weights in a buffer, and copies them out of it.
FSDP_COPIES = 2
# In a forward pass it also keeps the buffer of the layer before.
FSDP_LAYERS = 3
# Stage 3 of DeepSpeed keeps as many gathered parameters, and fetches as many ahead in a buffer.
ZERO_LIVE = 10**9
ZERO_AHEAD = 5 * 10**7
# Of one parameter, in float32: Adam's two moments; stages 1 and 2 of DeepSpeed copy it as well.
ADAM = 2 * FLOAT32
ADAM_AND_COPY = 3 * FLOAT32


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


class CompensationMemory(NamedTuple):
    """Bytes that one process of a compensation needs on its device.

    Attributes:
        weights: The model with what is trained, or this process's part of it.
        gradients: Gradients, and DDP's buckets for them.
        optimizer: States of AdamW.
        activations: What a forward and a backward pass add, or, if that is more, what the start of
            ddp does.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(self)


def bases_bytes(linears: Iterable[LinearShape], element_size: int = FLOAT32) -> int:
    """Return the size of the decompositions of dense linears: U, s and V of each.

    Args:
        linears: The linears.
        element_size: e; decompositions are in float32 or better.

    Returns:
        ``(N K + K + K M) max(e, 4)`` of each.
    """
    size = max(element_size, FLOAT32)
    return sum(_rank(x) * (x.rows + 1 + x.columns) * size for x in linears)


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
    return sum(FLOAT64 * _rank(linear) for linear in linears)


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
    rank = _rank(linear)
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
    rank, rows, columns = _rank(linear), linear.rows, linear.columns
    inputs = seqlen * (rows + columns)
    projected = min(2 * seqlen * rank, rows * columns)
    if not is_full:
        return FLOAT32 * (inputs + projected)
    products = rank * (rows + columns) + 2 * rank * max(rows, columns)
    return FLOAT32 * (inputs + projected + products)


def layer_bytes(model: ModelShape, run: Pass) -> int:
    """Return what autograd keeps of one decoder layer whose weights are frozen.

    Per token: the inputs of both norms in float32, ``8 D``; queries and the output of attention,
    ``2 Q c``; keys and values, ``2 G c``; one number per head, ``4``; of the MLP both projections
    and the activated one, ``3 I c``, or without a gate what is activated, ``I c``. Attention that
    forms its matrix of scores keeps them twice, ``8 T`` per head. Under bf16-mixed autograd also
    keeps each float32 weight in bfloat16.

    Args:
        model: The model.
        run: What runs through it.

    Returns:
        Bytes.
    """
    computed = _computed_size(model, run)
    keys = model.queries if run.is_padded else model.keys
    num_inner = 3 if model.is_gated else 1
    per_token = 2 * FLOAT32 * model.hidden
    per_token += 2 * (model.queries + keys) * computed + FLOAT32 * model.num_heads
    per_token += num_inner * model.inner * computed
    if model.is_eager:
        per_token += 2 * FLOAT32 * run.seqlen * model.num_heads
    return run.num_tokens * per_token + _cast_weights(model, run)


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
    computed = _computed_size(model, run)
    if scored.lowest is None:
        return _forward_bytes(model, run)
    kept = (len(model.layers) - scored.lowest) * layer_bytes(model, run)
    held = run.num_tokens * (2 * model.hidden + model.inner) * computed
    scoring = max(
        window_bytes(linear, run.seqlen, is_full=scored.is_full) for linear in scored.linears
    )
    backward = run.num_tokens * (3 * model.inner + 2 * model.hidden) * computed + scoring
    return kept + scored.num_layers * held + max(head_bytes(model, run), backward)


def head_bytes(model: ModelShape, run: Pass, num_logits: int = 1) -> int:
    """Return what the head of a model and the loss need.

    Per token: logits once, ``V c``, since the loss puts their gradient in their place; input and
    output of the last norm, ``4 D + c D``. The loss takes a few rows at a time.

    Args:
        model: The model.
        run: What runs through it.
        num_logits: How many models give logits: with a teacher there are two.

    Returns:
        Bytes.
    """
    computed = _computed_size(model, run)
    per_token = num_logits * model.vocabulary * computed + (FLOAT32 + computed) * model.hidden
    return run.num_tokens * per_token + LOSS_PARTS


def evaluation_bytes(model: ModelShape, run: Pass) -> int:
    """Return what a pass that measures perplexity needs beside the weights.

    Args:
        model: The model.
        run: Windows of one forward pass.

    Returns:
        Bytes: logits, or one layer's MLP.
    """
    return max(head_bytes(model, run), _forward_bytes(model, run))


def sampling_bytes(model: ModelShape, run: Pass) -> int:
    """Return what a model that writes text needs beside the weights.

    Args:
        model: The model.
        run: Texts that are written together.

    Returns:
        Bytes: keys and values of all tokens. Layers that attend to a sliding window keep fewer,
        Falcon's that repeat keys for all heads of queries more.
    """
    return 2 * len(model.layers) * model.keys * run.num_tokens * model.element_size


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


def trained_parameters(model: ModelShape, adapters: Adapters) -> int:
    """Return the number of parameters that a compensation trains.

    Args:
        model: The compressed model.
        adapters: What is trained.

    Returns:
        The number.
    """
    return sum(adapters.parameters(matrix) for matrix in _trained(model, adapters))


def compensation_activations(
    model: ModelShape,
    run: Pass,
    adapters: Adapters,
    *,
    is_checkpointed: bool,
    num_logits: int = 1,
) -> int:
    """Return what a forward and a backward pass of compensation need beside parameters.

    Autograd keeps ``layer_bytes`` of every layer. Per token of an adapter it keeps its input after
    dropout, ``4 M`` (``2 M`` under bf16-mixed), the mask of dropout, ``M`` on a GPU and ``4 M`` on
    a CPU, and its inner values, as many as its rank. Without dropout, and of trained factors, it
    keeps the input. With checkpointing only the input of every layer is kept, ``e D``, and one
    layer is computed again. Under bf16-mixed a copy of what is trained stays for the whole step,
    ``2 t``.

    Args:
        model: The compressed model.
        run: Rows of one forward pass.
        adapters: What is trained.
        is_checkpointed: Whether activations are computed again in the backward pass.
        num_logits: How many models give logits.

    Returns:
        Bytes.
    """
    layers = [
        layer_bytes(model, run) + run.num_tokens * _adapter_bytes(model, run, adapters, position)
        for position in range(len(model.layers))
    ]
    computed = _computed_size(model, run)
    backward = run.num_tokens * (5 * model.inner + 2 * model.hidden) * computed
    if adapters.has_dropout and adapters.rank is not None:
        backward += run.num_tokens * 2 * model.inner * FLOAT32
    head = head_bytes(model, run, num_logits)
    copies = HALF * trained_parameters(model, adapters) if run.is_mixed else 0
    if not is_checkpointed:
        return copies + sum(layers) + max(head, backward)
    inputs = len(layers) * run.num_tokens * model.hidden * model.element_size
    return copies + inputs + max(head, max(layers, default=0) + backward)


def compensation_memory(
    model: ModelShape,
    strategy: Strategy,
    num_processes: int,
    *,
    trained: int,
    is_new: bool,
    activations: int,
    teacher: int = 0,
) -> tuple[CompensationMemory, int]:
    """Return what one process of a compensation needs on its device, and on its host.

    - auto and ddp: all of it in every process; ddp has buckets as large as the gradients, and
      copies a part of the weights when it starts, before there is anything else.
    - fsdp: every process holds its part of everything, what is in no decoder layer whole while a
      pass runs, and one whole decoder layer with the buffers of it and of the one before.
    - stage 3: its part of everything, 10^9 gathered parameters at most, and a buffer for those that
      are fetched ahead.
    - stages 1 and 2: optimizer states in parts, in stage 2 gradients, too; DeepSpeed's optimizer
      works on a float32 copy of what is trained.
    - offload: that copy, the states and a copy of the gradients lie in the host's memory, with
      stage 3 the parts of the weights, too.

    DeepSpeed's communication buckets are not counted.

    Args:
        model: The compressed model.
        strategy: Trainer strategy.
        num_processes: Number of processes.
        trained: t.
        is_new: Whether what is trained comes on top of the model, as adapters do.
        activations: Bytes of activations.
        teacher: Bytes of a teacher beside the model.

    Returns:
        Bytes by kind on the device, and bytes on the host.
    """
    new = FLOAT32 * trained if is_new else 0
    whole = model.weights + new
    gradients, parts = FLOAT32 * trained, max(num_processes, 1)
    is_split = strategy == "fsdp" or "stage_3" in strategy
    gathered = _gathered(model, strategy, new) if is_split else 0
    weights = _ceil(whole, parts) + gathered if is_split and parts > 1 else whole
    optimizer = _optimizer_bytes(strategy, trained, parts)
    if strategy == "ddp" and parts > 1:
        gradients *= 2
        activations = max(activations, min(whole, DDP_COPIES) - gradients - optimizer)
    elif is_split or "stage_2" in strategy:
        gradients = _ceil(gradients, parts)
    host = 0
    if strategy.endswith("offload"):
        host = _ceil((ADAM_AND_COPY + FLOAT32) * trained, parts)
        optimizer = 0
        if is_split:
            host += _ceil(whole, parts)
            weights = gathered
    return CompensationMemory(weights + teacher, gradients, optimizer, activations), host


def _optimizer_bytes(strategy: Strategy, trained: int, parts: int) -> int:
    if strategy in ("deepspeed_stage_1", "deepspeed_stage_2"):
        return _ceil(ADAM_AND_COPY * trained, parts)
    return ADAM * trained if strategy in ("auto", "ddp") else _ceil(ADAM * trained, parts)


def _adapter_bytes(model: ModelShape, run: Pass, adapters: Adapters, position: int) -> int:
    """Return what autograd keeps of the adapters of a layer, per token."""
    kept = HALF if run.is_mixed else FLOAT32
    mask = FLOAT32 if run.on_cpu else 1
    total = 0
    for name, linear in model.layers[position].linears.items():
        if not adapters.trains(name, linear):
            continue
        for matrix in linear.matrices:
            total += (kept + mask * _drops(adapters)) * matrix.columns
            total += kept * adapters.rank_on(matrix)
    return total


def _drops(adapters: Adapters) -> bool:
    return adapters.has_dropout and adapters.rank is not None


def _forward_bytes(model: ModelShape, run: Pass) -> int:
    """Return what a forward pass without autograd needs at its peak, in one MLP."""
    computed = _computed_size(model, run)
    return run.num_tokens * (3 * model.inner * computed + 4 * FLOAT32 * model.hidden)


def _trained(model: ModelShape, adapters: Adapters) -> Iterable[LinearShape]:
    for layer in model.layers:
        for name, linear in layer.linears.items():
            if adapters.trains(name, linear):
                yield from linear.matrices


def _cast_weights(model: ModelShape, run: Pass) -> int:
    if not run.is_mixed or model.element_size <= HALF:
        return 0
    linears = [linear for layer in model.layers for linear in layer.linears.values()]
    return HALF * sum(linear.parameters for linear in linears) // len(model.layers)


def _computed_size(model: ModelShape, run: Pass) -> int:
    return HALF if run.is_mixed else model.element_size


def _rank(linear: LinearShape) -> int:
    return min(linear.rows, linear.columns)


def _split_linears(model: ModelShape, parts: int) -> int:
    """Return what a process holds of a model whose linears are split one by one."""
    if parts == 1:
        return model.weights
    tied = model.tied * model.element_size
    return tied + _ceil(model.weights - tied, parts) + FSDP_COPIES * model.largest_split


def _gathered(model: ModelShape, strategy: Strategy, new: int) -> int:
    """Return what a process holds of weights beside its part of them, at most."""
    if strategy == "fsdp":
        layer = model.largest_layer + _ceil(new, max(len(model.layers), 1))
        return model.outside + FSDP_LAYERS * layer
    return sum(min(model.weights + new, n * model.element_size) for n in (ZERO_LIVE, ZERO_AHEAD))


def _ceil(size: int, num_parts: int) -> int:
    return -(-size // num_parts)  # rounded up
