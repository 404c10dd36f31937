"""Columns of the table of a grid, and its rows as text."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.throughput import Spread
from grasp_lightning.reporting.comparison.entries import Entry, entries, same_but_seed, texts
from grasp_lightning.reporting.comparison.results import Comparison
from grasp_lightning.reporting.evaluation import is_share, number_text
from grasp_lightning.reporting.tables import (
    duration_text,
    factor_text,
    perplexity_text,
    size_text,
)
from grasp_lightning.reporting.throughput import rate_text

Kind = Literal["row", "number", "text"]
Part = Literal["name", "quality", "task", "cost", "failure"]
_PERCENT = 100


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    Attributes:
        kind: ``row`` names the row, ``number`` is aligned right, ``text`` left.
        text: What a cell of the grid shows; empty if it has no value.
        value: The number that is averaged over seeds; None for columns without a mean.
        number: How that number is written.
        part: What the column is about; a narrow terminal shows only some parts at once.
    """

    heading: str
    kind: Kind = "number"
    text: Callable[[Entry], str]
    value: Callable[[Entry], float | None] | None = None
    number: Callable[[float], str] = str
    part: Part = "quality"


class TextTable(NamedTuple):
    """Columns that have a value in some row, and all rows as text."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def only(self, *parts: Part) -> "TextTable":
        """Return the table with the columns of some parts."""
        kept = [place for place, column in enumerate(self.columns) if column.part in parts]
        return TextTable(
            tuple(self.columns[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
        )


def text_table(comparison: Comparison) -> TextTable:
    """Return a row per cell; after several seeds, a row with their mean and spread."""
    found = entries(comparison)
    columns = tuple(_columns(found))
    rows = []
    for group in same_but_seed(found):
        rows += [tuple(column.text(entry) for column in columns) for entry in group]
        if sum(entry.cell.error is None for entry in group) > 1:
            rows.append(tuple(_mean_text(column, group) for column in columns))
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    return TextTable(
        tuple(columns[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
    )


def notes(comparison: Comparison) -> list[str]:
    """Return sentences on how to read the table, and on the whole grid."""
    cells = comparison.cells
    found = []
    if any(cell.zeros for cell in cells):
        found.append(
            "Zeros: share of all parameters that are set to zero. They are stored like all others, "
            "so these models are no smaller."
        )
    if any(cell.perplexity for cell in cells):
        found.append("Perplexity: lower is better. In parentheses: the factor to the dense model.")
    if any(cell.tasks for cell in cells):
        found.append(
            "Tasks in percent. In parentheses: the paired difference to the dense model on the "
            "same documents, and its standard error."
        )
    if any(cell.prefill or cell.decode for cell in cells):
        found.append(
            "Prefill and decode: speed relative to the dense model in the same round, median and "
            "quartiles; above 1 is faster."
        )
    if any(cell.paper for cell in cells):
        found.append('Columns with "paper" hold the paper\'s own numbers, as it rounds them.')
    if any(len(group) > 1 for group in same_but_seed(entries(comparison))):
        found.append('Rows "mean": mean and standard deviation over the seeds.')
    failed = sum(cell.error is not None for cell in cells)
    count = f"{len(cells)} cells" + (f", {failed} of them failed" if failed else "")
    found.append(f"{count}, in {duration_text(comparison.seconds)}. {comparison.machine}.")
    return found


def _columns(of: Sequence[Entry]) -> Iterator[Column]:
    cells = [entry.cell for entry in of]
    if len({cell.model for cell in cells}) > 1:
        yield Column(heading="model", kind="row", text=lambda entry: entry.cell.model, part="name")
    yield Column(heading="method", kind="row", text=lambda entry: entry.label, part="name")
    if len({cell.seed for cell in cells}) > 1:
        yield Column(heading="seed", text=_seed, part="name")
    yield Column(heading="requested", text=_requested, part="name")
    removed = _number("removed", lambda entry: entry.cell.removed, lambda share: f"{share:.2%}")
    yield replace(removed, text=_removed_or(removed.text), part="name")
    zeros = _number("zeros", lambda entry: entry.cell.zeros or None, lambda share: f"{share:.2%}")
    yield replace(zeros, part="name")
    yield from _with_paper(of, _quality(of))
    yield from _with_paper(of, _cost())
    yield Column(heading="reason", kind="text", text=_reason, part="failure")


def _quality(of: Sequence[Entry]) -> Iterator[tuple[str, Column]]:
    """Yield columns with the name of the paper's numbers for each."""
    for text in texts(of):
        yield text, _perplexity(text)
    for task, metric in (of[0].metrics if of else {}).items():
        yield task, _task(task, metric)
    yield "mean", _mean_of_tasks(of[0].mean_tasks if of else [])
    share = _number("of dense", lambda entry: entry.share_of_dense, lambda value: f"{value:.1%}")
    yield "percent", share
    loss = _number("validation loss", lambda entry: entry.cell.validation_loss, "{:.3f}".format)
    yield "validation_loss", loss


def _cost() -> Iterator[tuple[str, Column]]:
    """Yield columns with the name of the paper's numbers for each."""

    def size(heading: str, value: Callable[[Entry], float | None]) -> Column:
        return _number(heading, value, lambda number: size_text(round(number)), "cost")

    yield "bytes", size("bytes", lambda entry: entry.cell.bytes)
    yield "prefill", _speed("prefill", lambda entry: entry.cell.prefill)
    yield "decode", _speed("decode", lambda entry: entry.cell.decode)
    yield "seconds", _number("time", lambda entry: entry.cell.seconds, duration_text, "cost")
    yield "memory", size("peak memory", lambda entry: entry.cell.peak_memory_bytes)
    yield (
        "tokens_per_second",
        _number(
            "training, tokens/s", lambda entry: entry.cell.tokens_per_second, rate_text, "cost"
        ),
    )


def _number(
    heading: str,
    value: Callable[[Entry], float | None],
    number: Callable[[float], str],
    part: Part = "quality",
) -> Column:
    def text(entry: Entry) -> str:
        found = value(entry)
        return "" if found is None else number(found)

    return Column(heading=heading, text=text, value=value, number=number, part=part)


def _seed(entry: Entry) -> str:
    return "" if entry.cell.is_dense else str(entry.cell.seed)


def _removed_or(text: Callable[[Entry], str]) -> Callable[[Entry], str]:
    """Return the text of a removed share, or that the cell failed."""
    return lambda entry: text(entry) if entry.cell.error is None else "failed"


def _reason(entry: Entry) -> str:
    return entry.cell.error or ""


def _requested(entry: Entry) -> str:
    share = entry.cell.removed_ratio
    return "" if share is None else f"{_PERCENT * share:g}%"


def _perplexity(name: str) -> Column:
    def text(entry: Entry) -> str:
        value = entry.cell.perplexity.get(name)
        if value is None:
            return ""
        # The dense cell has no factor, and then no brackets.
        factor = factor_text(1.0, entry.perplexity_factor(name))
        return _with_brackets(perplexity_text(value), factor)

    return Column(
        heading=name,
        text=text,
        value=lambda entry: entry.cell.perplexity.get(name),
        number=perplexity_text,
    )


def _task(name: str, metric: str) -> Column:
    heading = name if metric == "acc" else f"{name}, {metric}"
    column = _estimate(
        heading, metric, lambda entry: entry.task(name), lambda entry: entry.task_difference(name)
    )
    return replace(column, part="task")


def _mean_of_tasks(tasks: Sequence[str]) -> Column:
    return _estimate(
        f"mean of {len(tasks)} tasks" if tasks else "mean of tasks",
        "acc",
        lambda entry: entry.task_mean,
        lambda entry: entry.task_mean_difference,
    )


def _estimate(
    heading: str,
    metric: str,
    estimate: Callable[[Entry], Estimate | None],
    difference: Callable[[Entry], Estimate | None],
) -> Column:
    def text(entry: Entry) -> str:
        value, change = estimate(entry), difference(entry)
        if value is None:
            return ""
        # The error of the difference says more than that of the value.
        shown = number_text(value if change is None else Estimate(value.value, None), metric, "")
        return _with_brackets(shown, "" if change is None else number_text(change, metric, "+"))

    def mean(entry: Entry) -> float | None:
        value = estimate(entry)
        return None if value is None else value.value

    return Column(
        heading=heading,
        text=text,
        value=mean,
        number=lambda value: number_text(Estimate(value, None), metric, ""),
    )


def _speed(heading: str, spread: Callable[[Entry], Spread | None]) -> Column:
    def text(entry: Entry) -> str:
        found = spread(entry)
        if found is None:
            return ""
        return f"{found.median:.2f} ({found.first_quartile:.2f}-{found.third_quartile:.2f})"

    def median(entry: Entry) -> float | None:
        found = spread(entry)
        return None if found is None else found.median

    return Column(
        heading=heading,
        text=text,
        value=median,
        number=lambda value: f"{value:.2f}",
        part="cost",
    )


def _with_paper(of: Sequence[Entry], columns: Iterable[tuple[str, Column]]) -> Iterator[Column]:
    """Yield each column, and after it the paper's numbers if a cell has some."""
    for name, column in columns:
        yield column
        if any(name in entry.cell.paper for entry in of):
            yield _paper(name, column, of[0].metrics)


def _paper(name: str, column: Column, metrics: Mapping[str, str]) -> Column:
    is_percent = name in {"mean", "percent"} or is_share(metrics.get(name, ""))

    def text(entry: Entry) -> str:
        value = entry.cell.paper.get(name)
        if value is None:
            return ""
        if name == "seconds":
            return duration_text(value)
        # The paper's own number of digits.
        number = f"{_PERCENT * value:.4g}" if is_percent else f"{value:,.6g}"
        return f"{number}%" if name == "percent" else number

    return Column(heading=f"{column.heading}, paper", text=text, part=column.part)


def _with_brackets(text: str, addition: str) -> str:
    return f"{text} ({addition})" if addition else text


def _mean_text(column: Column, group: Sequence[Entry]) -> str:
    if column.text is _seed:
        return "mean"
    if column.value is None:
        alike = {column.text(entry) for entry in group}
        return alike.pop() if len(alike) == 1 else ""
    values = [value for value in map(column.value, group) if value is not None]
    if len(values) < 2:  # noqa: PLR2004  a spread needs two
        return ""
    return f"{column.number(statistics.fmean(values))} \u00b1 " + column.number(
        statistics.stdev(values)
    )
