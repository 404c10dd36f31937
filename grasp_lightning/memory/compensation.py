"""Memory of one compensation process, from shapes alone.

Weights, gradients and optimizer states are exact; ``activations`` explains the estimate of
activations.

Legend: M input features of a linear; e bytes per element of a weight; t trained parameters.
"""

from collections.abc import Iterable
from typing import NamedTuple

from grasp_lightning.config import Strategy
from grasp_lightning.memory.activations import (
    FLOAT32,
    HALF,
    computed_size,
    head_bytes,
    layer_bytes,
)
from grasp_lightning.memory.shapes import Adapters, Layer, ModelShape, Pass, part_of
from grasp_lightning.models.size import LinearShape

# At its start, DDP broadcasts the weights in two copies of 250 MiB at a time.
DDP_COPIES = 2 * 250 * 2**20
# FSDP2 gathers a layer into a buffer, copies it out, and keeps the buffer of the layer before.
FSDP_LAYERS = 3
# DeepSpeed stage 3 keeps this many gathered parameters, and prefetches this many.
ZERO_LIVE = 10**9
ZERO_AHEAD = 5 * 10**7
# Per parameter, in float32: Adam's two moments, and the copy of DeepSpeed stages 1 and 2.
ADAM = 2 * FLOAT32
ADAM_AND_COPY = 3 * FLOAT32
# bitsandbytes' 8-bit AdamW has a float32 scale for this many values of a moment.
BLOCK_8BIT = 256


class CompensationMemory(NamedTuple):
    """Bytes that one compensation process needs on its device.

    Attributes:
        weights: The model with the trained parameters, or this process's shard of them.
        gradients: Gradients, and DDP's buckets for them.
        optimizer: AdamW states.
        activations: Peak of a forward and backward pass, or of DDP's start if that is larger.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(self)


def compensation_memory(
    model: ModelShape,
    strategy: Strategy,
    num_processes: int,
    *,
    trained: int,
    is_new: bool,
    activations: int,
    teacher: int = 0,
    is_8bit: bool = False,
) -> tuple[CompensationMemory, int]:
    """Return what one compensation process needs on its device, by kind, and on its host.

    - auto and ddp: every process holds everything. DDP adds buckets as large as the gradients, and
      at its start copies some of the weights, before anything else is allocated.
    - fsdp: every process holds its shard of everything; during a pass also the whole weights
      outside decoder layers, one gathered decoder layer with its buffer, and the buffer of the
      layer before.
    - stage 3: its shard of everything, at most 10^9 gathered parameters, and a prefetch buffer.
    - stages 1 and 2: sharded optimizer states, in stage 2 also gradients; DeepSpeed's optimizer
      works on a float32 copy of the trained parameters.
    - offload: that copy, the states and a copy of the gradients are in host memory, with stage 3
      also the shards of the weights.

    DeepSpeed's communication buckets are not counted.

    Args:
        trained: t.
        is_new: Whether the trained parameters are added to the model, as adapters are.
        activations: Bytes of activations.
        teacher: Bytes of a teacher on the same device.
        is_8bit: Whether the optimizer keeps its states in 8 bits; the few small parameters whose
            states stay in float32 are not told apart.
    """
    new = FLOAT32 * trained if is_new else 0
    whole = model.weights + new
    gradients, parts = FLOAT32 * trained, max(num_processes, 1)
    is_split = strategy == "fsdp" or "stage_3" in strategy
    gathered = _gathered(model, strategy, new) if is_split else 0
    weights = part_of(whole, parts) + gathered if is_split and parts > 1 else whole
    optimizer = _optimizer_bytes(strategy, trained, parts, is_8bit=is_8bit)
    if strategy == "ddp" and parts > 1:
        gradients *= 2
        activations = max(activations, min(whole, DDP_COPIES) - gradients - optimizer)
    elif is_split or "stage_2" in strategy:
        gradients = part_of(gradients, parts)
    host = 0
    if strategy.endswith("offload"):
        host = part_of((ADAM_AND_COPY + FLOAT32) * trained, parts)
        optimizer = 0
        if is_split:
            host += part_of(whole, parts)
            weights = gathered
    return CompensationMemory(weights + teacher, gradients, optimizer, activations), host


def compensation_activations(
    model: ModelShape,
    run: Pass,
    adapters: Adapters,
    *,
    is_checkpointed: bool,
    num_logits: int = 1,
) -> int:
    """Return the peak of a compensation step besides parameters, in bytes.

    Without logits, only decoder layers run.

    Autograd keeps ``layer_bytes`` of every layer. Per token, an adapter keeps its input after
    dropout, ``4 M`` (``2 M`` under bf16-mixed), the dropout mask, ``M`` on a GPU and ``4 M`` on a
    CPU, and its inner values, as many as its rank. Without dropout, as with trained factors, it
    keeps its input. Gradient checkpointing keeps only the input of every layer, ``e D``, and
    recomputes one layer at a time. Under bf16-mixed, a copy of the trained parameters stays for the
    whole step, ``2 t``.
    """
    layers = [
        layer_bytes(model, run) + run.num_tokens * _adapter_bytes(layer, run, adapters)
        for layer in model.layers
    ]
    computed = computed_size(model, run)
    backward = run.num_tokens * (5 * model.inner + 2 * model.hidden) * computed
    if adapters.drops:
        backward += run.num_tokens * 2 * model.inner * FLOAT32
    head = head_bytes(model, run, num_logits) if num_logits else 0
    copies = HALF * trained_parameters(model, adapters) if run.is_mixed else 0
    if not is_checkpointed:
        return copies + sum(layers) + max(head, backward)
    inputs = len(layers) * run.num_tokens * model.hidden * model.element_size
    return copies + inputs + max(head, max(layers, default=0) + backward)


def trained_parameters(model: ModelShape, adapters: Adapters) -> int:
    """Return the number of parameters that a compensation trains."""
    if adapters.rank is None and adapters.on_dense:
        return sum(layer.parameters for layer in model.layers)
    rewritten = sum(layer.rewritten for layer in model.layers) if adapters.has_rewritten else 0
    trained = (matrix for layer in model.layers for matrix in _trained(layer, adapters))
    return rewritten + sum(adapters.parameters(matrix) for matrix in trained)


def _optimizer_bytes(strategy: Strategy, trained: int, parts: int, *, is_8bit: bool) -> int:
    if is_8bit or strategy in ("auto", "ddp"):  # states of 8 bits are never sharded
        return optimizer_bytes(trained, is_8bit=is_8bit)
    if strategy in ("deepspeed_stage_1", "deepspeed_stage_2"):
        return part_of(ADAM_AND_COPY * trained, parts)
    return part_of(ADAM * trained, parts)


def optimizer_bytes(trained: int, *, is_8bit: bool) -> int:
    """Return the bytes of AdamW's states that are not sharded."""
    if is_8bit:
        return 2 * trained + 2 * FLOAT32 * part_of(trained, BLOCK_8BIT)
    return ADAM * trained


def _adapter_bytes(layer: Layer, run: Pass, adapters: Adapters) -> int:
    """Return the bytes per token that autograd keeps of a layer's adapters."""
    kept = HALF if run.is_mixed else FLOAT32
    mask = (FLOAT32 if run.on_cpu else 1) if adapters.drops else 0
    return sum(
        (kept + mask) * matrix.columns + kept * adapters.rank_on(matrix)
        for matrix in _trained(layer, adapters)
    )


def _trained(layer: Layer, adapters: Adapters) -> Iterable[LinearShape]:
    for name, linear in layer.linears.items():
        if adapters.trains(name, linear):
            yield from linear.matrices


def _gathered(model: ModelShape, strategy: Strategy, new: int) -> int:
    """Return the most bytes of weights that a process holds in addition to its shard."""
    if strategy == "fsdp":
        layer = model.largest_layer + part_of(new, max(len(model.layers), 1))
        return model.outside + FSDP_LAYERS * layer
    return sum(min(model.weights + new, n * model.element_size) for n in (ZERO_LIVE, ZERO_AHEAD))
