"""The table of a grid for the terminal, as Markdown, and as CSV."""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.throughput import Spread
from grasp_lightning.reporting.comparison.columns import TextTable, notes, text_table
from grasp_lightning.reporting.comparison.entries import Entry, entries, texts
from grasp_lightning.reporting.comparison.results import Comparison
from grasp_lightning.reporting.tables import narrow_table

# An underscore inside a word is no markup.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>|#&]|(?<!\w)_|_(?!\w))")
_ELSEWHERE = "Single tasks are in the files."


def comparison_table(comparison: Comparison) -> Group:
    """Return quality, cost and notes for the terminal: no single tasks, failures as notes."""
    whole = text_table(comparison)
    reasons = [
        f"{_name(entry)} failed: {entry.cell.error}"
        for entry in entries(comparison)
        if entry.cell.error is not None
    ]
    hidden = [_ELSEWHERE] if whole.only("task").columns else []
    shown = [whole.only("name", part) for part in ("quality", "cost")]
    shown = [table for table in shown if len(table.columns) > len(whole.only("name").columns)]
    tables = [_terminal_table(table) for table in shown or [whole.only("name")]]
    return Group(*tables, Text("\n".join([*reasons, *notes(comparison), *hidden])))


def _terminal_table(content: TextTable) -> Table:
    table = narrow_table(())
    table.caption = None
    for column in content.columns:
        # Text, not str: names may hold brackets, which rich would read as markup.
        heading = Text(column.heading.replace(", ", "\n").replace("mean of ", "mean of\n"))
        justify: JustifyMethod = "left" if column.kind == "row" else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in content.rows:
        table.add_row(*map(Text, row))
    return table


def markdown_text(comparison: Comparison) -> str:
    """Return the whole table and its notes as Markdown."""
    table = text_table(comparison)
    rule = ["--:" if column.kind == "number" else ":--" for column in table.columns]
    lines = [[_escaped(column.heading) for column in table.columns], rule]
    lines += [[_escaped(text) for text in row] for row in table.rows]
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*rows, "", *(f"- {_escaped(note)}" for note in notes(comparison)), ""])


def csv_text(comparison: Comparison) -> str:
    """Return one line per cell with raw numbers: shares in [0, 1], bytes, seconds."""
    found = entries(comparison)
    records = [dict(_record(entry, found)) for entry in found]
    text = io.StringIO()
    # Every record has the same keys; an empty grid still has none.
    writer = csv.DictWriter(text, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(entry: Entry, of: tuple[Entry, ...]) -> Iterator[tuple[str, Any]]:  # Any: CSV values
    cell = entry.cell
    yield "model", cell.model
    yield "method", cell.method
    yield "compensation", cell.compensation
    yield "seed", cell.seed
    yield "requested_ratio", cell.removed_ratio
    yield "removed_ratio", cell.removed
    yield "zero_ratio", cell.zeros
    for text in texts(of):
        yield f"perplexity.{text}", cell.perplexity.get(text)
        yield f"perplexity_factor.{text}", entry.perplexity_factor(text)
    for task in entry.metrics:
        yield from _estimates(f"task.{task}", entry.task(task), entry.task_difference(task))
    yield from _estimates("task_mean", entry.task_mean, entry.task_mean_difference)
    yield "share_of_dense", entry.share_of_dense
    yield "validation_loss", cell.validation_loss
    yield "bytes", cell.bytes
    yield from _quartiles("prefill_ratio", cell.prefill)
    yield from _quartiles("decode_ratio", cell.decode)
    yield "seconds", cell.seconds
    yield "peak_memory_bytes", cell.peak_memory_bytes
    yield "trained_tokens", cell.trained_tokens
    yield "tokens_per_second", cell.tokens_per_second
    yield "trainable_parameters", cell.trainable_parameters
    for name in sorted({name for other in of for name in other.cell.paper}):
        yield f"paper.{name}", cell.paper.get(name)
    yield "folder", cell.folder
    yield "error", cell.error


def _estimates(
    name: str, estimate: Estimate | None, difference: Estimate | None
) -> Iterator[tuple[str, float | None]]:
    for suffix, found in (("", estimate), ("_difference", difference)):
        yield f"{name}{suffix}", None if found is None else found.value
        yield f"{name}{suffix}_stderr", None if found is None else found.stderr


def _quartiles(name: str, spread: Spread | None) -> Iterator[tuple[str, float | None]]:
    yield name, None if spread is None else spread.median
    yield f"{name}_first_quartile", None if spread is None else spread.first_quartile
    yield f"{name}_third_quartile", None if spread is None else spread.third_quartile


def _name(entry: Entry) -> str:
    """Return the cell's name for a message."""
    cell = entry.cell
    share = "" if cell.removed_ratio is None else f" at {100 * cell.removed_ratio:g}%"
    return f"{cell.model}, {entry.label}{share}, seed {cell.seed}"


def _escaped(text: str) -> str:
    """Return a text as a cell of a Markdown table, on one line and without markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
