"""From the files of a grid to the comparison that is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

from grasp_lightning.comparison.folder import GridFolder
from grasp_lightning.comparison.grid import Cell, is_asked
from grasp_lightning.comparison.measurements import Measurements
from grasp_lightning.comparison.paper import PaperNumbers, paper_columns
from grasp_lightning.errors import OutputError
from grasp_lightning.evaluation.task_results import TaskResult, TaskRun
from grasp_lightning.reading.text import read_json
from grasp_lightning.reporting.comparison.results import CellResult, Comparison
from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics
from grasp_lightning.run_folder import names

_Metrics = Metrics | CompensationMetrics
_Read = Callable[[Cell], _Metrics]  # the metrics.json of a cell
# What a run also does, besides to compress: everything else is the time of its method.
_NOT_COMPRESSION: Final = {"load", "save", "verify", "evaluate", "cut_losses", "total"}


def collect(
    folder: GridFolder, cells: Sequence[Cell], failures: Mapping[Cell, str], paper: PaperNumbers
) -> Comparison:
    """Return the results of all cells; a cell that failed has only its reason."""
    read: _Read = cache(lambda cell: _metrics(folder, cell))
    measured = {cell: Measurements.read(folder.measurements(cell)) for cell in cells}
    machines = dict.fromkeys(done.machine for done in measured.values() if done.machine)
    return Comparison(
        cells=tuple(
            replace(_unmeasured(folder, cell, paper), error=failures[cell])
            if cell in failures
            else _result(folder, cell, measured[cell], paper, read)
            for cell in cells
        ),
        machine="; ".join(machines),
        seconds=sum(sum(done.seconds.values()) for done in measured.values()),
    )


def _unmeasured(folder: GridFolder, cell: Cell, paper: PaperNumbers) -> CellResult:
    """Return what a cell asks for, and the paper's numbers."""
    return CellResult(
        model=cell.model,
        method=cell.method,
        removed_ratio=cell.removed_ratio,
        seed=cell.seed,
        compensation=cell.compensation,
        folder=_relative(folder, cell),
        paper=paper_columns(paper, cell),
    )


def _result(
    folder: GridFolder, cell: Cell, done: Measurements, paper: PaperNumbers, read: _Read
) -> CellResult:
    config = folder.config
    names_of_tasks = config.tasks.names if is_asked(config.tasks, cell) else ()
    runs = [(name, done.tasks[name].result) for name in names_of_tasks]
    speeds = done.speed.result if done.speed is not None and is_asked(config.speed, cell) else {}
    result = replace(
        _unmeasured(folder, cell, paper),
        removed=0.0,
        zeros=0.0,
        perplexity={name: done.texts[name].result.perplexity for name in config.texts},
        tasks={task: result for name, run in runs for task, result in _asked(name, run).items()},
        bytes=None if done.cost is None else done.cost.result.bytes,
        prefill=speeds["prefill"].ratio if "prefill" in speeds else None,
        decode=speeds["decode"].ratio if "decode" in speeds else None,
    )
    if not cell.is_dense:
        result = _with_compression(result, read(cell.base))
    for training in _trainings(cell):
        result = _with_training(result, read(training))
    return result


def _trainings(cell: Cell) -> list[Cell]:
    """Return the trained cells that lead to a cell, and the cell, in order."""
    return [*_trainings(cell.start), cell] if cell.is_trained else []


def _asked(name: str, run: TaskRun) -> Mapping[str, TaskResult]:
    """Return the result of a requested name: of a group its own, without those of its tasks."""
    return {name: run.results[name]} if name in run.results else run.results


def _relative(folder: GridFolder, cell: Cell) -> str:
    return "" if cell.is_dense else folder.run(cell).relative_to(folder.root).as_posix()


def _with_compression(result: CellResult, metrics: _Metrics) -> CellResult:
    assert isinstance(metrics, Metrics)
    return replace(
        result,
        removed=metrics.removed_ratio,
        zeros=metrics.zero_ratio,
        seconds=_seconds(metrics),
        peak_memory_bytes=metrics.peak_memory_bytes,
    )


def _with_training(result: CellResult, metrics: _Metrics) -> CellResult:
    assert isinstance(metrics, CompensationMetrics)
    return replace(
        result,  # training changes no size, but it may change zeros
        zeros=None,
        validation_loss=metrics.validation_loss.after,
        trained_tokens=(result.trained_tokens or 0) + metrics.trained_tokens,
        tokens_per_second=metrics.tokens_per_second,
        trainable_parameters=metrics.parameters.trainable,
        seconds=(result.seconds or 0.0) + _seconds(metrics),
        peak_memory_bytes=max(result.peak_memory_bytes or 0, metrics.peak_memory_bytes or 0),
    )


def _seconds(metrics: _Metrics) -> float:
    """Return the seconds to compress, or to train."""
    phases = vars(metrics.seconds).items()
    return sum(value or 0.0 for name, value in phases if name not in _NOT_COMPRESSION)


def _metrics(folder: GridFolder, cell: Cell) -> _Metrics:
    file: Path = folder.run(cell) / names.METRICS
    content = read_json(file, OutputError, str(file), "run the cell again")
    if cell.is_trained:
        return CompensationMetrics.from_dict(content)
    return Metrics.from_dict(content)
