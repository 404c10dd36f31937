"""Memory of one process of a layer-local training, from shapes alone.

Legend: D hidden size; t parameters that the largest stage trains.
"""

from dataclasses import replace

from grasp_lightning.config import CompensateConfig
from grasp_lightning.memory.activations import FLOAT32, HALF
from grasp_lightning.memory.compensation import (
    CompensationMemory,
    compensation_activations,
    optimizer_bytes,
    trained_parameters,
)
from grasp_lightning.memory.shapes import Adapters, ModelShape, Pass, part_of

_GIGA = 10**9
_ERRORS = 3  # hidden states in float32 that the error compares


def local_memory(
    config: CompensateConfig,
    dense: ModelShape,
    compressed: ModelShape,
    run: Pass,
    adapters: Adapters,
    *,
    num_processes: int,
) -> CompensationMemory:
    """Return what one process needs on its device, by kind.

    - weights: both models, if they share the device, and float32 copies of the trained weights, as
      they are and, with ``keep: best``, as they were best. Of a streamed model, what is outside the
      layers, the layers of one stage, and the dense layer that is read next.
    - gradients: ``4 t``; several processes sum them in a copy.
    - activations: those of the largest stage, of the error, and the hidden states in memory.
    """
    size = config.local.layers_at_once
    stages = [
        replace(compressed, layers=compressed.layers[start : start + size])
        for start in range(0, len(compressed.layers), size)
    ]
    trained = max(trained_parameters(stage, adapters) for stage in stages)
    activations = max(
        compensation_activations(stage, run, adapters, is_checkpointed=False, num_logits=0)
        for stage in stages
    )
    if compressed.element_size < FLOAT32:  # the trained weights in the model's own type
        activations += HALF * trained
    activations += _ERRORS * FLOAT32 * run.num_tokens * compressed.hidden
    most = int(config.local.max_memory * _GIGA)
    kept = min(hidden_state_bytes(config, dense, compressed, num_processes), most)
    copies = 2 if config.training.keep == "best" else 1
    teacher, model = dense.weights, compressed.weights
    if config.model.loading == "streamed":
        teacher = dense.outside + dense.largest_layer
        model = compressed.outside + size * compressed.largest_layer
    if config.distillation.device != "auto":
        teacher = 0
    return CompensationMemory(
        weights=model + copies * FLOAT32 * trained + teacher,
        gradients=FLOAT32 * trained * (2 if num_processes > 1 else 1),
        optimizer=optimizer_bytes(trained, is_8bit=config.optimizer.name == "adamw_8bit"),
        activations=activations + kept,
    )


def hidden_state_bytes(
    config: CompensateConfig, dense: ModelShape, compressed: ModelShape, num_processes: int
) -> int:
    """Return the bytes of one process's hidden states of both models, ``D`` values per token."""
    windows = part_of(config.text.num_samples, num_processes)
    if config.training.validate_every is not None:
        windows += part_of(config.text.num_validation, num_processes)
    tokens = windows * config.text.seqlen
    return tokens * compressed.hidden * (dense.element_size + compressed.element_size)
