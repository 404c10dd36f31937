"""Memory of a calibration whose model is streamed: one decoder layer on the device at a time."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from grasp_lightning.config import CompressConfig
from grasp_lightning.memory.calibration import (
    CalibrationMemory,
    bases_bytes,
    calibration_memory,
    factors_bytes,
)
from grasp_lightning.memory.shapes import ModelShape, Pass, Scored
from grasp_lightning.models.size import LinearShape

_REFIT_STATES = 6  # of one layer: both models before and after it, and the outputs of two linears
_COPIES = 2  # of factors: in the decision, and in the progress of the run


class StreamedMemory(NamedTuple):
    """What a streamed calibration needs, in bytes.

    Attributes:
        device: On the device, where one layer has its weights.
        host: Hidden states up to ``statistics.max_memory``, the layer that is read next,
            decompositions that wait, and factors.
        disk: Temporary files with the other hidden states.
    """

    device: CalibrationMemory
    host: int
    disk: int


def streamed_memory(
    config: CompressConfig,
    model: ModelShape,
    replaced: Iterable[LinearShape],
    run: Pass,
    scored: Scored,
    *,
    moments: int,
) -> StreamedMemory:
    """Return what a streamed calibration needs.

    Args:
        config: Configuration with its method resolved.
        model: The model before compression.
        replaced: The linears that are replaced, with their ranks.
        run: Windows of one forward pass.
        scored: What the most expensive pass of a whole model scores.
        moments: Bytes of the Gram matrices of the largest layer.
    """
    largest = max(model.layers, key=lambda layer: layer.parameters)
    outside = model.outside // model.element_size
    alone = replace(model, layers=(largest,), parameters=outside + largest.parameters)
    one = replace(
        scored,
        linears=tuple(largest.linears.values()) if scored.linears else (),
        lowest=None if scored.lowest is None else 0,
        num_layers=min(scored.num_layers, 1),
        moments=moments,
    )
    hidden, waiting = _hidden_bytes(config, model, scored), 0
    if scored.has_bases:
        waiting = bases_bytes(scored.linears, model.element_size)
    in_memory = min(hidden, int(config.statistics.max_memory * 1e9))
    factors = _COPIES * factors_bytes(replaced)
    return StreamedMemory(
        device=calibration_memory(alone, (), run, one),
        host=in_memory + model.largest_layer + waiting + factors,
        disk=hidden - in_memory,
    )


def _hidden_bytes(config: CompressConfig, model: ModelShape, scored: Scored) -> int:
    """Return the bytes of hidden states that are kept at a time.

    A backward sweep needs the inputs of all layers that it goes through; a forward sweep those of
    as many layers as the metric compares across.
    """
    tokens = config.calibration.num_samples * config.calibration.seqlen
    layer = tokens * model.hidden * model.element_size
    num_layers = 1
    if config.method.layer_metric == "angular":
        num_layers = config.method.num_layers or 1
    if scored.lowest is not None:
        num_layers = max(num_layers, len(model.layers) - scored.lowest)
    swept = (num_layers + 1) * layer
    if config.method.refit in (None, "none"):
        return swept
    inner = tokens * model.inner * model.element_size
    return max(swept, _REFIT_STATES * layer + inner)
