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
        num_processes: Number of processes of the configuration.
        device_bytes: Memory of the device for which the way to load is chosen; None: not asked.
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
    num_processes: int = 1
    device_bytes: int | None = None


class CompensationRow(NamedTuple):
    """Memory of a compensation under one strategy.

    Attributes:
        memory: Bytes during training.
        total_checkpointed: Bytes during training with gradient checkpointing.
        host: Bytes of the offloaded part.
        before_training: Bytes while a dense model writes text or fills the cache; 0 without one.
    """

    memory: CompensationMemory
    total_checkpointed: int
    host: int
    before_training: int = 0

    @property
    def peaks(self) -> tuple[int, int]:
        """Most bytes of the whole run, without and with gradient checkpointing."""
        before = self.before_training
        return max(self.memory.total, before), max(self.total_checkpointed, before)


class CachedPredictions(NamedTuple):
    """A teacher's cache on disk; ``num_tokens`` is None if only the data can tell."""

    bytes_per_token: int
    num_tokens: int | None

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the whole cache, None if only the data can tell."""
        return None if self.num_tokens is None else self.num_tokens * self.bytes_per_token


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
        hidden_states: Bytes of hidden states on all windows that one process keeps, in memory or on
            disk; None if the training is not layer-local.
        modes: Bytes by what is trained, in one process with strategy auto.
        cached: The teacher's cache, if it has one.
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
    hidden_states: int | None = None
    cached: CachedPredictions | None = None


def memory_lines(calibration: CalibrationPlan | None, compensation: CompensationPlan) -> list[str]:
    """Return the tables of a calibration, if there is one, and of the compensation after it."""
    largest = max(row.memory.total for row in compensation.rows.values())
    unit, name = (_GIGA, "GB") if largest >= _GIGA else (_MEGA, "MB")
    before = [] if calibration is None else [*_calibration_lines(calibration, unit, name), ""]
    return [
        f"Memory per process, in {name}; without interpreter, libraries and device context",
        "",
        *before,
        *_compensation_lines(compensation, unit),
        *_cache_lines(compensation.cached),
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
        lines[-1:-1] = _streamed_lines(plan.streamed, unit, name)
    if plan.sampled_texts:
        size = f"{plan.sampled_texts} x {plan.seqlen} tokens"
        lines.append(f"text that the model generates, {size}: {sampling} {name}, weights included")
    if plan.device_bytes is not None:
        lines += _choice_lines(plan, plan.device_bytes, unit, name)
    return lines


def _streamed_lines(streamed: StreamedMemory, unit: int, name: str) -> list[str]:
    sizes = (streamed.host, streamed.together, streamed.disk, streamed.run, streamed.read)
    host, together, disk, run, read = _cells(sizes, unit)
    return [
        f"streamed (model.loading=streamed): also {host} {name} of host memory, {disk} {name} of",
        f"  temporary files, and up to {run} {name} in output_dir; about {read} {name} are read;",
        f"  on a CPU, whose memory is both: {together} {name} at most at a time",
    ]


def _choice_lines(plan: CalibrationPlan, available: int, unit: int, name: str) -> list[str]:
    """Return which way to load a device with some memory takes, and the numbers behind it."""
    needed = {"whole": plan.rows["auto"].total}
    keys = {"whole": "model.loading=whole", "streamed": "model.loading=streamed"}
    for label, row in plan.rows.items():
        if label.startswith("fsdp") and plan.num_processes > 1:
            needed["fsdp"], keys["fsdp"] = row.total, "trainer.strategy=fsdp"
    if plan.streamed is not None:
        needed["streamed"] = plan.streamed.device.total
    (room,) = _cells([available], unit)
    found = ", ".join(f"{way} needs {size / unit:.2f}" for way, size in needed.items())
    fits = [way for way, size in needed.items() if size <= available]
    least = min(needed, key=lambda way: needed[way])
    take = f"take {fits[0]} ({keys[fits[0]]})" if fits else f"nothing fits, least needs {least}"
    return [f"device of {room} {name}: {found}: {take}"]


def _compensation_lines(plan: CompensationPlan, unit: int) -> list[str]:
    header = ("weights", "gradients", "optimizer", "activations", "total", "checkpointed", "host")
    rows: dict[str, Sequence[str]] = {}
    for strategy, row in plan.rows.items():
        label = "auto, 1 process" if strategy == "auto" else strategy
        rows[label] = _cells((*row.memory, *row.peaks, row.host), unit)
    modes: dict[str, Sequence[str]] = {
        train: _cells((*row.memory, *row.peaks), unit) for train, row in plan.modes.items()
    }
    source = plan.source or "the defaults"
    (activations,) = _cells([plan.activations_checkpointed], unit)
    size = f"{plan.batch_size} x {plan.seqlen} tokens"
    notes = [
        f"checkpointed: total with training.gradient_checkpointing, activations {activations};",
        "host: memory offloaded from the device",
    ]
    if plan.hidden_states is not None:
        (hidden,) = _cells([plan.hidden_states], unit)
        notes = [
            f"a few layers at a time; activations: with hidden states, {hidden} in one process, or",
            "local.max_memory if that is less",
        ]
    return [
        f"compensation with {source}, {plan.processes} processes, {size} at a time,",
        f"train: {plan.train}, {plan.trained:,} parameters trained",
        *_aligned(header, rows),
        *notes,
        *_lines_before_training(plan, unit),
        "by what is trained, auto, 1 process",
        *_aligned(header[:-1], modes, "train"),
    ]


def _lines_before_training(plan: CompensationPlan, unit: int) -> list[str]:
    """Return what the totals count of a dense model that is released before training."""
    sizes = sorted({row.before_training for row in plan.rows.values()} - {0})
    if not sizes:
        return []
    found = " to ".join(_cells(sizes, unit))
    return [f"before training, with the dense model: {found}; the totals are the larger of both"]


def _cache_lines(cached: CachedPredictions | None) -> list[str]:
    if cached is None:
        return []
    size = f"{cached.bytes_per_token} bytes per predicted token"
    if cached.num_bytes is not None:
        size = f"{cached.num_bytes / _MEGA:,.1f} MB, {size}"
    return [f"the teacher's cache on disk: {size}"]


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
