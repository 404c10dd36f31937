"""Plots of a grid: which ones, their findings, the Pareto line, and equal bytes."""

import subprocess
import sys
from dataclasses import replace

from grasp_lightning.reporting.comparison.files import comparison_files
from grasp_lightning.reporting.comparison.plots import Point, comparison_plots, pareto
from tests.unit.reporting.comparison.example import (
    COMPARISON,
    DENSE_CELL,
    DROP_CELL,
    FAILED_CELL,
    cell,
)

_PRINT_HASH = (
    "import hashlib\n"
    "from grasp_lightning.reporting.comparison.files import comparison_files\n"
    "from tests.unit.reporting.comparison.example import COMPARISON\n"
    "print(hashlib.sha256(repr(comparison_files(COMPARISON)).encode()).hexdigest())\n"
)


def test_there_is_a_plot_for_each_kind_of_measurement() -> None:
    assert list(comparison_plots(COMPARISON)) == ["perplexity.svg", "accuracy.svg", "speed.svg"]


def test_plots_without_data_are_left_out() -> None:
    drop = replace(DROP_CELL, tasks={}, prefill=None, decode=None)
    comparison = replace(COMPARISON, cells=(DENSE_CELL, drop))
    assert list(comparison_plots(comparison)) == ["perplexity.svg"]
    assert comparison_plots(replace(COMPARISON, cells=(DENSE_CELL, FAILED_CELL))) == {}
    assert comparison_plots(replace(COMPARISON, cells=())) == {}


def test_the_title_names_the_best_at_the_share_that_most_methods_have() -> None:
    cells = (
        DENSE_CELL,
        DROP_CELL,
        cell("grasp", 0.2, removed=0.2, perplexity={"WikiText-2": 25.5}),
        cell("grasp", 0.1, removed=0.1, perplexity={"WikiText-2": 21.0}),
    )
    plot = comparison_plots(replace(COMPARISON, cells=cells))["perplexity.svg"]
    assert plot.title == "grasp has the lowest perplexity on WikiText-2 at 20% removed: 25.50"
    assert "drop 21.05, 30" in plot.alt


def test_models_with_zeros_are_not_drawn_over_what_is_removed() -> None:
    perplexity = {"WikiText-2": 1.0}
    sparse = replace(DROP_CELL, method="wanda", removed=0.0, zeros=0.2, perplexity=perplexity)
    plots = comparison_plots(replace(COMPARISON, cells=(DENSE_CELL, DROP_CELL, sparse)))
    assert plots["perplexity.svg"].title.startswith("drop has the lowest perplexity")
    assert plots["perplexity.svg"].explanation.endswith("not drawn: they remove nothing.")


def test_seeds_become_one_point() -> None:
    second = replace(DROP_CELL, seed=1, perplexity={"WikiText-2": 40.0})
    comparison = replace(COMPARISON, cells=(DENSE_CELL, DROP_CELL, second))
    assert "Points: drop 21.05, 35." in comparison_plots(comparison)["perplexity.svg"].alt


def test_names_are_drawn_as_they_are() -> None:
    odd = replace(DROP_CELL, method="_a$\\b$", perplexity={"$\\x": 30.0})
    comparison = replace(COMPARISON, cells=(replace(DENSE_CELL, perplexity={"$\\x": 20.0}), odd))
    assert len(comparison_plots(comparison)) == 3


def test_the_pareto_line_keeps_what_nothing_beats_in_both() -> None:
    def point(x: float, y: float) -> Point:
        return Point("tiny", "method", 0.2, x, y)

    fast, good, both, beaten = point(2.0, 90.0), point(1.0, 20.0), point(1.5, 40.0), point(1.4, 41)
    assert pareto([good, beaten, fast, both, point(1.5, 50.0)]) == [fast, both, good]


def test_equal_grids_give_equal_bytes_in_another_process() -> None:
    command = [sys.executable, "-c", _PRINT_HASH]
    first, second = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)
    )
    assert first == second
    changed = replace(DROP_CELL, perplexity={"WikiText-2": 31.0, "C4": 60.0})
    other = comparison_files(replace(COMPARISON, cells=(DENSE_CELL, changed, FAILED_CELL)))
    same = comparison_files(COMPARISON)
    assert {name for name in same if same[name] != other[name]} == set(same) - {"accuracy.svg"}
