"""Draws perplexity against the removed share for all methods, from the table in docs/results.md.

    python benchmarks/plot_methods.py

The table is the only place of the numbers: run this again after it has changed.
"""

import argparse
import re
from pathlib import Path
from typing import Final, NamedTuple

from grasp_lightning.reporting.comparison.plots import comparison_plots
from grasp_lightning.reporting.comparison.results import DENSE, CellResult, Comparison

ROOT: Final = Path(__file__).resolve().parents[1]
TABLE: Final = ROOT / "docs/results.md"
PLOT: Final = ROOT / "docs/images/perplexity.svg"
TEXTS: Final = ("WikiText-2", "C4")

_HEADER = ("method", "removed", *TEXTS)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


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
    header = next((cells for cells in map(_cells, lines) if {*_HEADER} <= {*cells}), None)
    if header is None:
        raise ValueError(f"no table with the columns {', '.join(_HEADER)}")
    next(lines)  # the line under the header
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        row = dict(zip(header, _cells(line), strict=True))
        removed, *perplexities = (_number(row[name]) for name in _HEADER[1:])
        rows.append(Row(row["method"], removed, dict(zip(TEXTS, perplexities, strict=True))))
    return rows


def _number(text: str) -> float:
    """Return the first number of a cell, such as 5465.6 of ``5,465.60 (x 184.62)``."""
    return float(_NUMBER.findall(text.replace(",", ""))[0])


def draw(rows: list[Row], file: Path) -> None:
    """Write the plot that ``compare`` makes of such a table; equal rows give equal bytes."""
    cells = tuple(
        CellResult(
            model="SmolLM2-135M-Instruct",
            method=row.method,
            removed_ratio=None if row.method == DENSE else round(row.removed, -1) / 100,
            seed=0,
            compensation=None,
            folder="",
            removed=row.removed / 100,
            perplexity=row.perplexity,
        )
        for row in rows
    )
    plots = comparison_plots(Comparison(cells=cells, machine="", seconds=0.0))
    lines = [line.rstrip() for line in plots["perplexity.svg"].svg.splitlines()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


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
