"""Cells next to the dense model: factors, paired differences and means."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from grasp_lightning.evaluation.paired import Estimate, mean_of
from grasp_lightning.evaluation.results import task_difference
from grasp_lightning.reporting.comparison.results import CellResult, Comparison
from grasp_lightning.reporting.evaluation import is_share, ordered_metrics


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell, the dense cell of its model, and the tasks of the whole grid.

    Attributes:
        dense: None if the grid has none.
        metrics: The metric that is shown, by task.
    """

    cell: CellResult
    dense: CellResult | None
    metrics: Mapping[str, str]

    @property
    def label(self) -> str:
        """Method, and training after compression."""
        cell = self.cell
        return cell.method if cell.compensation is None else f"{cell.method} + {cell.compensation}"

    @property
    def is_compared(self) -> bool:
        """True if there is a dense model that this one can be compared with."""
        return self.dense is not None and not self.cell.is_dense

    def perplexity_factor(self, text: str) -> float | None:
        """Return the perplexity divided by the dense model's; None if one is missing."""
        before = self.dense.perplexity.get(text) if self.dense is not None else None
        after = self.cell.perplexity.get(text)
        return after / before if before and after is not None and self.is_compared else None

    def task(self, task: str) -> Estimate | None:
        """Return the task's metric; None if it was not measured."""
        result = self.cell.tasks.get(task)
        return None if result is None else result.metrics.get(self.metrics[task])

    def task_difference(self, task: str) -> Estimate | None:
        """Return the paired difference to the dense model; None if it cannot be paired."""
        result = self.cell.tasks.get(task)
        if result is None or self.dense is None or not self.is_compared:
            return None
        return task_difference(result, self.dense.tasks.get(task), self.metrics[task])

    @property
    def mean_tasks(self) -> list[str]:
        """All tasks of the grid whose metric is a share, such as accuracy."""
        return [task for task, metric in self.metrics.items() if is_share(metric)]

    @property
    def task_mean(self) -> Estimate | None:
        """Mean over ``mean_tasks``; None if one was not measured."""
        return _mean(self.task(task) for task in self.mean_tasks)

    @property
    def task_mean_difference(self) -> Estimate | None:
        """Mean paired difference over ``mean_tasks``; None if one is missing."""
        return _mean(self.task_difference(task) for task in self.mean_tasks)

    @property
    def share_of_dense(self) -> float | None:
        """The mean over tasks, divided by the dense model's; None if one is missing."""
        if self.dense is None or not self.is_compared or self.task_mean is None:
            return None
        before = Entry(cell=self.dense, dense=None, metrics=self.metrics).task_mean
        return self.task_mean.value / before.value if before and before.value else None


def entries(comparison: Comparison) -> tuple[Entry, ...]:
    """Return all cells in their order, each with the dense cell of its model."""
    metrics = _metrics(comparison.cells)
    dense: dict[str, CellResult] = {}
    for cell in comparison.cells:
        if cell.is_dense:
            dense.setdefault(cell.model, cell)
    return tuple(
        Entry(cell=cell, dense=dense.get(cell.model), metrics=metrics) for cell in comparison.cells
    )


def same_but_seed(of: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
    """Yield the cells that differ only in their seed, in the order of their first cell."""

    def key(entry: Entry) -> tuple[str, str, float | None]:
        return entry.cell.model, entry.label, entry.cell.removed_ratio

    places = {key(entry): place for place, entry in reversed(list(enumerate(of)))}
    for _, group in groupby(sorted(of, key=lambda entry: places[key(entry)]), key):
        yield tuple(group)


def texts(of: Iterable[Entry]) -> list[str]:
    """Return the names of all texts, in the order of their first appearance."""
    return list(dict.fromkeys(text for entry in of for text in entry.cell.perplexity))


def _metrics(cells: Sequence[CellResult]) -> dict[str, str]:
    """Return the metric to show for each task: accuracy if the task has one."""
    found: dict[str, str] = {}
    for cell in cells:
        for task, result in cell.tasks.items():
            if result.metrics:
                found.setdefault(task, ordered_metrics([result.metrics])[0])
    return found


def _mean(estimates: Iterable[Estimate | None]) -> Estimate | None:
    found = list(estimates)
    known = [estimate for estimate in found if estimate is not None]
    return mean_of(known) if known and len(known) == len(found) else None
