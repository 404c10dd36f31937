"""How much memory a process of compensation needs, from shapes alone.

Weights, gradients and optimizer states are counted to the byte; ``activations``
says how activations are estimated.

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

# When DDP starts, it sends the weights in copies of 250 MiB, two of them at a time.
DDP_COPIES = 2 * 250 * 2**20
# FSDP2 gathers a layer in a buffer, copies it out, and keeps the buffer of the layer before.
FSDP_LAYERS = 3
# Stage 3 of DeepSpeed keeps as many gathered parameters, and fetches as many ahead in a buffer.
ZERO_LIVE = 10**9
ZERO_AHEAD = 5 * 10**7
# Of one parameter, in float32: Adam's two moments; stages 1 and 2 of DeepSpeed copy it as well.
ADAM = 2 * FLOAT32
ADAM_AND_COPY = 3 * FLOAT32


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
    weights = part_of(whole, parts) + gathered if is_split and parts > 1 else whole
    optimizer = _optimizer_bytes(strategy, trained, parts)
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
        layer_bytes(model, run) + run.num_tokens * _adapter_bytes(layer, run, adapters)
        for layer in model.layers
    ]
    computed = computed_size(model, run)
    backward = run.num_tokens * (5 * model.inner + 2 * model.hidden) * computed
    if adapters.drops:
        backward += run.num_tokens * 2 * model.inner * FLOAT32
    head = head_bytes(model, run, num_logits)
    copies = HALF * trained_parameters(model, adapters) if run.is_mixed else 0
    if not is_checkpointed:
        return copies + sum(layers) + max(head, backward)
    inputs = len(layers) * run.num_tokens * model.hidden * model.element_size
    return copies + inputs + max(head, max(layers, default=0) + backward)


def trained_parameters(model: ModelShape, adapters: Adapters) -> int:
    """Return the number of parameters that a compensation trains.

    Args:
        model: The compressed model.
        adapters: What is trained.

    Returns:
        The number.
    """
    trained = (matrix for layer in model.layers for matrix in _trained(layer, adapters))
    return sum(adapters.parameters(matrix) for matrix in trained)


def _optimizer_bytes(strategy: Strategy, trained: int, parts: int) -> int:
    if strategy in ("deepspeed_stage_1", "deepspeed_stage_2"):
        return part_of(ADAM_AND_COPY * trained, parts)
    return ADAM * trained if strategy in ("auto", "ddp") else part_of(ADAM * trained, parts)


def _adapter_bytes(layer: Layer, run: Pass, adapters: Adapters) -> int:
    """Return what autograd keeps of the adapters of a layer, per token."""
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
    """Return what a process holds of weights beside its part of them, at most."""
    if strategy == "fsdp":
        layer = model.largest_layer + part_of(new, max(len(model.layers), 1))
        return model.outside + FSDP_LAYERS * layer
    return sum(min(model.weights + new, n * model.element_size) for n in (ZERO_LIVE, ZERO_AHEAD))
