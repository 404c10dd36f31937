"""Draws perplexity against the removed share for all methods, from the table in docs/results.md.

    python benchmarks/plot_methods.py

The table is the only place of the numbers: run this again after it has changed.
"""

import argparse
import re
from io import StringIO
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

ROOT: Final = Path(__file__).resolve().parents[1]
TABLE: Final = ROOT / "docs/results.md"
PLOT: Final = ROOT / "docs/images/perplexity.svg"
TEXTS: Final = ("WikiText-2", "C4")
DENSE: Final = "dense"

_HEADER = ("method", "removed", *TEXTS)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Colors that stay apart for the color-blind (Okabe and Ito); markers for print without color.
_STYLES = {
    "grasp": ("#D55E00", "s"),
    "svd_llm": ("#CC79A7", "^"),
    "drop": ("#009E73", "D"),
    "grasp_plus": ("#0072B2", "o"),
}


class Row(NamedTuple):
    """One row: removed parameters in percent, and perplexity by text."""

    method: str
    removed: float
    perplexity: dict[str, float]


def read_rows(markdown: str) -> list[Row]:
    """Return the rows of the first table that has methods, removed shares and both texts.

    Raises:
        ValueError: If there is no such table.
    """
    lines = iter(markdown.splitlines())
    if not any(_cells(line)[: len(_HEADER)] == list(_HEADER) for line in lines):
        raise ValueError(f"no table with the columns {', '.join(_HEADER)}")
    next(lines)  # the line under the header
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        method, *values = _cells(line)[: len(_HEADER)]
        removed, *perplexities = (float(_NUMBER.findall(value)[0]) for value in values)
        rows.append(Row(method, removed, dict(zip(TEXTS, perplexities, strict=True))))
    return rows


def draw(rows: list[Row], file: Path) -> None:
    """Write the plot; equal rows give equal bytes."""
    with mpl.rc_context({"svg.hashsalt": "perplexity", "svg.fonttype": "path"}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        panels = figure.subplots(1, len(TEXTS), sharey=True)
        for text, axes in zip(TEXTS, panels, strict=True):
            _draw_text(axes, rows, text)
        panels[0].set_ylabel("perplexity (log scale, lower is better)")
        content = StringIO()
        # Neither the day nor the version of the library.
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    lines = [line.rstrip() for line in content.getvalue().splitlines()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _draw_text(axes: Axes, rows: list[Row], text: str) -> None:
    (dense,) = (row.perplexity[text] for row in rows if row.method == DENSE)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"dense {dense:.2f}", (8.5, dense), (0, -12), textcoords="offset points")
    for method, (color, marker) in _STYLES.items():
        points = [(row.removed, row.perplexity[text]) for row in rows if row.method == method]
        removed, values = zip(*points, strict=True)
        axes.plot(removed, values, color=color, marker=marker, linewidth=2)
        axes.annotate(
            f"{method} {values[-1]:,.1f}",
            (removed[-1], values[-1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
        )
    axes.set_title(text)
    axes.set_xlabel("parameters removed, %")
    axes.set_xticks([10, 20, 30])
    axes.set_xlim(8, 41)
    axes.set_yscale("log")
    axes.set_ylim(20, 13000)
    axes.set_yticks([30, 100, 300, 1000, 3000, 10000])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> None:
    """Read the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--table", type=Path, default=TABLE, help="Markdown file with the table")
    parser.add_argument("--output", type=Path, default=PLOT, help="SVG file to write")
    args = parser.parse_args()
    draw(read_rows(args.table.read_text(encoding="utf-8")), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
