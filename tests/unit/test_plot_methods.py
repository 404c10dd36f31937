"""The plot of README.md shows the table of docs/results.md."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plot_methods  # noqa: E402  a program, not a module of a package

RESULTS = (ROOT / "docs/results.md").read_text(encoding="utf-8")


def test_rows_are_those_of_the_table() -> None:
    rows = plot_methods.read_rows(RESULTS)
    assert len(rows) == 13
    assert rows[0] == ("dense", 0.0, {"WikiText-2": 29.60, "C4": 29.05})
    assert rows[1] == ("drop", 10.5, {"WikiText-2": 52.6, "C4": 48.0})
    assert rows[-1] == ("grasp_plus", 30.0, {"WikiText-2": 46.0, "C4": 55.5})


def test_the_plot_is_drawn_from_the_table_as_it_is(tmp_path: Path) -> None:
    drawn = tmp_path / "perplexity.svg"
    plot_methods.draw(plot_methods.read_rows(RESULTS), drawn)
    advice = "run: python benchmarks/plot_methods.py"
    assert drawn.read_bytes() == plot_methods.PLOT.read_bytes(), advice


def test_another_number_gives_another_plot(tmp_path: Path) -> None:
    changed = RESULTS.replace("| **36.7** (x 1.24) |", "| **36.8** (x 1.24) |", 1)
    assert changed != RESULTS
    drawn = tmp_path / "perplexity.svg"
    plot_methods.draw(plot_methods.read_rows(changed), drawn)
    assert drawn.read_bytes() != plot_methods.PLOT.read_bytes()


def test_a_page_without_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table with the columns method, removed"):
        plot_methods.read_rows("| method | removed |\n|---|---|\n")
