"""Tables of the memory per process for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grasp_lightning.config import Strategy, TrainMode
from grasp_lightning.memory.calibration import CalibrationMemory
from grasp_lightning.memory.compensation import CompensationMemory
from grasp_lightning.memory.streamed import StreamedMemory

_MEGA = 1_000_000
_GIGA = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """Memory of a calibration.

    Attributes:
        batch_size: Windows per forward pass.
        seqlen: Tokens per window.
        lowest: Lowest layer that a backward pass reaches; None if there is none.
        trains_layer: One layer is trained.
        rows: Bytes by strategy.
        evaluation_tokens: Tokens per forward pass of the perplexity measurement.
        evaluation: Bytes of that measurement, the model included.
        sampled_texts: Number of calibration windows that the model generates together.
        sampling: Bytes of that generation, the model included.
        streamed: Bytes with ``model.loading=streamed``; None if the method cannot be streamed.
    """

    batch_size: int
    seqlen: int
    lowest: int | None
    rows: Mapping[str, CalibrationMemory]
    evaluation_tokens: int
    evaluation: int
    sampled_texts: int
    sampling: int
    trains_layer: bool = False
    streamed: StreamedMemory | None = None


class CompensationRow(NamedTuple):
    """Memory of a compensation under one strategy; ``host`` is the offloaded part."""

    memory: CompensationMemory
    total_checkpointed: int
    host: int


@dataclass(frozen=True, kw_only=True)
class CompensationPlan:
    """Memory of a compensation.

    Attributes:
        source: Configuration file; None for the defaults.
        trained: Number of trained parameters.
        batch_size: Rows per forward pass.
        seqlen: Tokens per row.
        activations_checkpointed: Bytes of activations with gradient checkpointing.
        rows: Bytes by strategy.
        modes: Bytes by what is trained, in one process with strategy auto.
    """

    source: str | None
    train: TrainMode
    trained: int
    batch_size: int
    seqlen: int
    processes: int
    activations_checkpointed: int
    rows: Mapping[Strategy, CompensationRow]
    modes: Mapping[TrainMode, CompensationRow]


def memory_lines(calibration: CalibrationPlan, compensation: CompensationPlan) -> list[str]:
    """Return the tables of a calibration and of the compensation after it."""
    largest = max(row.memory.total for row in compensation.rows.values())
    unit, name = (_GIGA, "GB") if largest >= _GIGA else (_MEGA, "MB")
    return [
        f"Memory per process, in {name}; without interpreter, libraries and device context",
        "",
        *_calibration_lines(calibration, unit, name),
        "",
        *_compensation_lines(compensation, unit),
    ]


def _calibration_lines(plan: CalibrationPlan, unit: int, name: str) -> list[str]:
    reach = "no backward pass"
    if plan.trains_layer:
        reach = "backward pass through one layer"
    elif plan.lowest is not None:
        reach = f"backward pass down to layer {plan.lowest}"
    header = ("weights", "statistics", "factors", "activations", "cache", "total")
    rows = {label: _cells((*row, row.total), unit) for label, row in plan.rows.items()}
    if plan.streamed is not None:
        device = plan.streamed.device
        rows["streamed"] = _cells((*device, device.total), unit)
    evaluation, sampling = _cells([plan.evaluation, plan.sampling], unit)
    tokens = plan.evaluation_tokens
    lines = [
        f"calibration, {plan.batch_size} x {plan.seqlen} tokens at a time, {reach}",
        *_aligned(header, rows),
        f"perplexity, {tokens} tokens at a time: {evaluation} {name}, weights included",
    ]
    if plan.streamed is not None:
        host, disk = _cells([plan.streamed.host, plan.streamed.disk], unit)
        lines.insert(
            -1,
            f"streamed (model.loading=streamed): also {host} {name} of host memory, and {disk} "
            f"{name} of temporary files",
        )
    if plan.sampled_texts:
        size = f"{plan.sampled_texts} x {plan.seqlen} tokens"
        lines.append(f"text that the model generates, {size}: {sampling} {name}, weights included")
    return lines


def _compensation_lines(plan: CompensationPlan, unit: int) -> list[str]:
    header = ("weights", "gradients", "optimizer", "activations", "total", "checkpointed", "host")
    rows: dict[str, Sequence[str]] = {}
    for strategy, (memory, total_checkpointed, host) in plan.rows.items():
        label = "auto, 1 process" if strategy == "auto" else strategy
        rows[label] = _cells((*memory, memory.total, total_checkpointed, host), unit)
    modes: dict[str, Sequence[str]] = {
        train: _cells((*row.memory, row.memory.total, row.total_checkpointed), unit)
        for train, row in plan.modes.items()
    }
    source = plan.source or "the defaults"
    (activations,) = _cells([plan.activations_checkpointed], unit)
    size = f"{plan.batch_size} x {plan.seqlen} tokens"
    return [
        f"compensation with {source}, {plan.processes} processes, {size} at a time,",
        f"train: {plan.train}, {plan.trained:,} parameters trained",
        *_aligned(header, rows),
        f"checkpointed: total with training.gradient_checkpointing, activations {activations};",
        "host: memory offloaded from the device",
        "by what is trained, auto, 1 process",
        *_aligned(header[:-1], modes, "train"),
    ]


def _cells(sizes: Iterable[int], unit: int) -> list[str]:
    return [f"{size / unit:.2f}" for size in sizes]


def _aligned(
    header: Sequence[str], rows: Mapping[str, Sequence[str]], first_column: str = "strategy"
) -> list[str]:
    """Return table lines with a left-aligned first column and right-aligned others."""
    table = {first_column: header, **rows}
    first = max(map(len, table))
    widths = [max(len(cells[i]) for cells in table.values()) for i in range(len(header))]
    return [
        "  "
        + "  ".join([label.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
        for label, cells in table.items()
    ]
