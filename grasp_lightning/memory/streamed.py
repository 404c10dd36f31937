"""Memory of a calibration whose model is streamed: one decoder layer on the device at a time.

What is measured, decided and refitted of other layers is in files, so that nothing grows with the
number of layers.

Legend: a linear has N outputs and M inputs; e bytes per element of a weight.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from grasp_lightning.config import CompressConfig
from grasp_lightning.memory.activations import FLOAT32, FLOAT64, evaluation_bytes
from grasp_lightning.memory.calibration import (
    CalibrationMemory,
    bases_bytes,
    calibration_memory,
    factors_bytes,
)
from grasp_lightning.memory.shapes import ModelShape, Pass, Scored
from grasp_lightning.models.size import LinearShape

_REFIT_STATES = 6  # of one layer: both models before and after it, and the outputs of two linears
_INVERSES = 4  # the inverse of a Gram matrix, its kept part, the update, and the result
_SOLVED = 4  # the sums of a refit, the damped ones or their root, and copies by LAPACK
_FACTOR_COPIES = 3  # on disk, in float32: as decided, as refitted, and as the step
# A load hashes all layers, looks for uncalled linears, and sees twice that each layer runs alone.
_READS_OF_LOAD, _READS_OF_SWEEP = 6, 2  # a sweep begins with a pass over the whole model
_READS_OF_DECISION, _READS_OF_SAVING = 1, 1


class StreamedMemory(NamedTuple):
    """What a streamed calibration needs, in bytes.

    Attributes:
        device: On the device in its most expensive phase, where one layer has its weights.
        host: Hidden states up to ``statistics.max_memory``, and the layer that is read next, of one
            process.
        together: Where a CPU is the device: the peak of both in one phase.
        disk: Temporary files of all processes: the other hidden states, and decompositions that
            wait.
        run: Files in the folder of the run, until it ends: statistics, factors and the model.
        read: Bytes of decoder layers that all processes read from the checkpoint, about.
    """

    device: CalibrationMemory
    host: int
    together: int
    disk: int
    run: int
    read: int


class _Phase(NamedTuple):
    """Bytes of one phase."""

    device: CalibrationMemory
    host: int

    @property
    def together(self) -> int:
        """Bytes where device and host are the same memory."""
        return self.device.total + self.host


def streamed_memory(
    config: CompressConfig,
    model: ModelShape,
    replaced: Iterable[LinearShape],
    run: Pass,
    scored: Scored,
    *,
    moments: int,
    written: int,
) -> StreamedMemory:
    """Return what a streamed calibration needs.

    Args:
        config: Configuration with its method resolved.
        model: The model before compression.
        replaced: The linears that are replaced, with their ranks.
        run: Windows of one forward pass.
        scored: What the most expensive pass of a whole model scores.
        moments: Bytes of the Gram matrices of the largest layer.
        written: Parameters of the compressed model.
    """
    replaced = tuple(replaced)
    hidden = _hidden_bytes(config, model, scored)
    in_memory = min(hidden, int(config.statistics.max_memory * 1e9))
    waiting = bases_bytes(scored.linears, model.element_size) if scored.has_bases else 0
    phases = [_sweep(model, run, scored, moments, in_memory), *_decision(model, replaced, scored)]
    if config.method.refit not in (None, "none"):
        phases.append(_refit(model, replaced, in_memory))
    num_layers = max(scored.num_layers, 1)
    packed = moments * num_layers // 2
    factors = _FACTOR_COPIES * factors_bytes(replaced)
    return StreamedMemory(
        device=max((phase.device for phase in phases), key=lambda device: device.total),
        host=max(phase.host for phase in phases),
        together=max(phase.together for phase in phases),
        disk=config.trainer.devices * (hidden - in_memory) + waiting,
        run=packed + factors + 2 * written * model.element_size,
        read=config.trainer.devices * _num_reads(config, scored) * (model.weights - model.outside),
    )


def streamed_evaluation(model: ModelShape, run: Pass, hidden: int) -> int:
    """Return what a streamed perplexity needs where a CPU is the device.

    Args:
        model: The model.
        run: Windows of one forward pass.
        hidden: Bytes of hidden states that are kept in memory.
    """
    return model.outside + 2 * model.largest_layer + evaluation_bytes(model, run) + hidden


def _sweep(model: ModelShape, run: Pass, scored: Scored, moments: int, in_memory: int) -> _Phase:
    """Return the bytes of a sweep: one layer is measured, and the next one is read."""
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
    return _Phase(calibration_memory(alone, (), run, one), in_memory + model.largest_layer)


def _decision(
    model: ModelShape, replaced: Iterable[LinearShape], scored: Scored
) -> Iterable[_Phase]:
    """Yield the bytes of decisions on the largest matrix that is truncated, and on an MLP."""
    if scored.has_bases or not scored.linears:
        return
    replaced = tuple(replaced)
    cut = [linear for linear in replaced if linear.rank is not None]
    if cut:
        yield _alone(model, max(metric_bytes(linear) for linear in cut))
    if any(linear.is_narrowed for linear in replaced):
        yield _alone(model, removal_bytes(model.hidden, model.inner))


def _refit(model: ModelShape, replaced: Iterable[LinearShape], in_memory: int) -> _Phase:
    """Return the bytes of a refit: a layer, dense and compressed, with the largest fit."""
    by_layer = factors_bytes(replaced) // len(model.layers)
    inner = max((x.rank or x.columns for x in replaced if x.is_replaced), default=0)
    sums = FLOAT64 * _SOLVED * inner * (inner + model.hidden)
    layer = by_layer + by_layer * model.element_size // FLOAT32 + model.largest_layer
    device = CalibrationMemory(
        weights=model.outside + layer, statistics=0, factors=0, activations=sums, cache=0
    )
    return _Phase(device, in_memory + model.largest_layer)


def _alone(model: ModelShape, decision: int) -> _Phase:
    """Return the bytes of a decision on one matrix: no layer has its weights."""
    device = CalibrationMemory(
        weights=model.outside, statistics=0, factors=0, activations=decision, cache=0
    )
    return _Phase(device, 0)


def metric_bytes(linear: LinearShape) -> int:
    """Return what a decomposition of a linear in a metric needs, with its result.

    In float64: the root of each metric, the weight between them, a copy of it, its decomposition
    twice, and the workspace ``4 K^2``; in float32: the moments.
    """
    rows, columns, rank = linear.rows, linear.columns, linear.num_components
    squares = rows**2 + columns**2
    basis = rank * (rows + columns)
    return FLOAT32 * squares + FLOAT64 * (squares + 2 * rows * columns + 2 * basis + 4 * rank**2)


def removal_bytes(rows: int, columns: int) -> int:
    """Return what ordering the channels of an MLP needs, ``36 M^2 + 16 N M``."""
    return FLOAT32 * columns**2 + FLOAT64 * (_INVERSES * columns**2 + 2 * rows * columns)


def _num_reads(config: CompressConfig, scored: Scored) -> int:
    """Return how often the decoder layers are read, about."""
    perplexities = 2 * _READS_OF_SWEEP
    found = _READS_OF_LOAD + perplexities + _READS_OF_SAVING
    if config.method.layer_metric is not None:
        found += _READS_OF_SWEEP
    if scored.linears:
        found += _READS_OF_SWEEP + (scored.lowest is not None) + _READS_OF_DECISION
    return found + (config.method.refit not in (None, "none")) * _READS_OF_SWEEP


def _hidden_bytes(config: CompressConfig, model: ModelShape, scored: Scored) -> int:
    """Return the bytes of hidden states that a process keeps at a time.

    A backward sweep needs the inputs of all layers that it goes through; a forward sweep those of
    as many layers as the metric compares across.
    """
    windows = -(-config.calibration.num_samples // config.trainer.devices)
    tokens = windows * config.calibration.seqlen
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
