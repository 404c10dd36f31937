"""The before/after comparison as text, for the terminal, the report page and the model card."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from grasp_lightning.reporting.metrics import Metrics, Pair

NOT_MEASURED = "not measured"
_MEGA = 1_000_000
_GIGA = 1_000_000_000


class Row(NamedTuple):
    """One line of the comparison, ready to print.

    Attributes:
        quantity: What is compared, with its unit.
        dense: Value before compression.
        compressed: Value after it.
        change: Percentage of the dense value, or a factor for perplexity.
    """

    quantity: str
    dense: str
    compressed: str
    change: str


def comparison_table(metrics: Metrics) -> Table:
    """Return the dense model against the compressed one, for the terminal.

    Args:
        metrics: Numbers of one run.

    Returns:
        A table with a title, one line per quantity, and a caption on what was measured.
    """
    return change_table(
        f"{metrics.model}: {summary(metrics)}",
        ("dense", "compressed", "change"),
        comparison_rows(metrics),
        comparison_notes(metrics),
    )


def change_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str]
) -> Table:
    """Return two states of a model side by side, for the terminal.

    Args:
        title: Name of the model, and what was done to it.
        headings: Of all columns but the first.
        rows: Quantity, both values, and the change.
        notes: Sentences for the caption.

    Returns:
        A table with numbers flush right.
    """
    # Text, not str: a model's name may hold brackets, which rich would read as markup.
    table = Table(title=Text(title), caption=Text(" ".join(notes)), caption_justify="left")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def comparison_rows(metrics: Metrics) -> tuple[Row, ...]:
    """Return parameters, bytes and perplexity, before and after, as text.

    Args:
        metrics: Numbers of one run.

    Returns:
        One row per quantity; sizes in millions of bytes at one dtype for both models.
    """
    linears, dtype = metrics.decoder_linears, metrics.dtype
    counts = (
        ("parameters", metrics.parameters),
        ("parameters in decoder linears", linears.parameters),
    )
    sizes = ((f"MB at {dtype}", metrics.bytes), ("MB in decoder linears", linears.bytes))
    return (
        *(_row(name, pair, "{:,}".format) for name, pair in counts),
        *(_row(name, pair, megabytes_text) for name, pair in sizes),
        Row(
            "perplexity",
            perplexity_text(metrics.perplexity.dense),
            perplexity_text(metrics.perplexity.compressed),
            factor_text(metrics.perplexity.dense, metrics.perplexity.compressed),
        ),
    )


def comparison_notes(metrics: Metrics) -> tuple[str, ...]:
    """Return the sentences a reader needs to judge the comparison.

    Args:
        metrics: Numbers of one run.

    Returns:
        What perplexity was measured on, how it was predicted to change, and how the source's own
        size compares.
    """
    notes = []
    if metrics.perplexity_tokens is not None:
        notes.append(perplexity_note(metrics.perplexity_tokens))
    if metrics.loss_change.predicted is not None and metrics.loss_change.measured is not None:
        notes.append(
            f"The loss was predicted to grow by {metrics.loss_change.predicted:.2f} nats per token "
            f"on the calibration text, and grows by {metrics.loss_change.measured:.2f} on the "
            "held-out text."
        )
    if metrics.source_bytes is not None and metrics.source_bytes < metrics.bytes.dense:
        notes.append(
            "The source stores its weights in fewer bits: "
            f"{size_text(metrics.source_bytes)} on disk, against {size_text(metrics.bytes.dense)} "
            f"for its own {metrics.dtype} copy and {size_text(metrics.bytes.compressed)} for the "
            "compressed model. Sizes are compared at equal dtype."
        )
    return tuple(notes)


def summary(metrics: Metrics) -> str:
    """Return what was done to the model, as a phrase: layers and removed parameters."""
    count = len(metrics.layers)
    noun = "decoder layer" if count == 1 else "decoder layers"
    removed = f"{metrics.removed_ratio:.1%} of all parameters removed"
    return f"{count} {noun} {done_to_layers(metrics.method)}, {removed}"


def done_to_layers(method: str) -> str:
    """Return what a method does to the layers that it takes, as a participle."""
    return {"drop": "dropped", "grasp": "replaced"}.get(method, "compressed")


def count_text(count: int) -> str:
    """Return a number of parameters with three or four digits and its unit, such as ``134.5 M``."""
    if count >= _GIGA:
        return f"{count / _GIGA:.2f} B"
    return f"{count / _MEGA:.1f} M" if count >= _MEGA else f"{count:,}"


def size_text(size: int) -> str:
    """Return a number of bytes in decimal units, such as ``538.1 MB`` or ``13.48 GB``."""
    return f"{size / _GIGA:,.2f} GB" if size >= _GIGA else f"{megabytes_text(size)} MB"


def megabytes_text(size: int) -> str:
    """Return a number of bytes in millions, without the unit."""
    megabytes = size / _MEGA
    return f"{megabytes:,.1f}" if megabytes >= 1 else f"{megabytes:.3f}"


def percent_text(before: int, after: int) -> str:
    """Return by which share a count changed, such as ``-19.0%``; empty where there was none."""
    return f"{after / before - 1:+.1%}" if before else ""


def perplexity_note(num_tokens: int) -> str:
    """Return the sentence on what perplexities were measured on."""
    return f"Perplexity on {num_tokens:,} predicted tokens of held-out text; lower is better."


def perplexity_text(perplexity: float | None) -> str:
    """Return a perplexity with two decimals."""
    return NOT_MEASURED if perplexity is None else f"{perplexity:,.2f}"


def factor_text(dense: float | None, compressed: float | None) -> str:
    """Return by which factor a value changed, such as ``x 1.53``; empty where one is missing."""
    if not dense or compressed is None or not math.isfinite(dense):
        return ""
    return f"x {compressed / dense:,.2f}"


def duration_text(seconds: float | None) -> str:
    """Return wall-clock seconds the way people say them, such as ``3 min 12 s``."""
    if seconds is None:
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def indices_text(indices: Iterable[int]) -> str:
    """Return ascending indices with runs joined, such as ``3, 20-23, 25``; ``none`` if empty."""
    runs = [
        [index for _, index in run]
        for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    ]
    return (
        ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
    )


def _row(quantity: str, pair: Pair[int], text: Callable[[int], str]) -> Row:
    change = percent_text(pair.dense, pair.compressed)
    return Row(quantity, text(pair.dense), text(pair.compressed), change)
