"""The table of a grid: values, failed rows, left-out columns, seeds, and CSV."""

import csv
import io
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.reporting.comparison.columns import text_table
from grasp_lightning.reporting.comparison.results import CellResult, Comparison
from grasp_lightning.reporting.comparison.table import comparison_table, csv_text, markdown_text
from tests.unit.reporting.comparison.example import (
    COMPARISON,
    DENSE_CELL,
    DROP_CELL,
    FAILED_CELL,
    cell,
)


def grid(*cells: CellResult) -> Comparison:
    return replace(COMPARISON, cells=cells)


def row(comparison: Comparison, place: int) -> dict[str, str]:
    table = text_table(comparison)
    return dict(zip((c.heading for c in table.columns), table.rows[place], strict=True))


def printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(comparison_table(comparison))
    return captured.get()


def test_a_row_shows_measurements_next_to_dense_and_paper() -> None:
    assert row(COMPARISON, 1) == {
        "method": "drop",
        "requested": "20%",
        "removed": "21.05%",
        "WikiText-2": "30.00 (x 1.50)",
        "WikiText-2, paper": "28",
        "C4": "60.00 (x 2.00)",
        "piqa": "50.0 (-25.0 \u00b1 25.0)",
        "arc_easy": "25.0 (-25.0 \u00b1 25.0)",
        # Independent errors of 25 percent: sqrt(2) * 25 / 2.
        "mean of 2 tasks": "37.5 (-25.0 \u00b1 17.7)",
        "mean of 2 tasks, paper": "40",
        "of dense": "60.0%",
        "bytes": "400.0 MB",
        "prefill": "1.25 (1.15-1.35)",
        "decode": "1.20 (1.10-1.30)",
        "time": "1 min 15 s",
        "peak memory": "1.50 GB",
        "reason": "",
    }


def test_the_dense_row_has_values_but_no_comparison() -> None:
    dense = row(COMPARISON, 0)
    assert dense["WikiText-2"] == "20.00"
    assert dense["mean of 2 tasks"] == "62.5 \u00b1 17.7"
    assert dense["of dense"] == dense["requested"] == ""


def test_a_failed_cell_is_one_row_with_its_reason() -> None:
    failed = {heading: text for heading, text in row(COMPARISON, 2).items() if text}
    assert failed == {
        "method": "sleb",
        "requested": "20%",
        "removed": "failed",
        "reason": "MethodError: tiny has no <layers>",
    }


def test_columns_without_a_value_are_left_out() -> None:
    dense = replace(DENSE_CELL, tasks={}, bytes=None)
    comparison = grid(dense, cell("drop", 0.1, removed=0.1, perplexity={"C4": 40.0}))
    headings = [column.heading for column in text_table(comparison).columns]
    assert headings == ["method", "requested", "removed", "WikiText-2", "C4"]


def test_a_mean_needs_every_task_of_the_grid() -> None:
    partial = replace(DROP_CELL, tasks={"piqa": DROP_CELL.tasks["piqa"]})
    assert row(grid(DENSE_CELL, partial), 1)["mean of 2 tasks"] == ""


def test_results_on_other_documents_are_not_paired() -> None:
    tasks = {name: replace(task, documents="other") for name, task in DROP_CELL.tasks.items()}
    assert row(grid(DENSE_CELL, replace(DROP_CELL, tasks=tasks)), 1)["piqa"] == "50.0 \u00b1 25.0"


def test_metrics_that_are_no_share_stay_out_of_the_mean() -> None:
    result = replace(DROP_CELL.tasks["piqa"], metrics={"word_perplexity": Estimate(31.25, None)})
    odd = replace(DENSE_CELL, tasks={**DENSE_CELL.tasks, "wikitext": result})
    assert row(grid(odd), 0)["mean of 2 tasks"] == "62.5 \u00b1 17.7"
    assert row(grid(odd), 0)["wikitext, word_perplexity"] == "31.25"


def test_several_seeds_get_a_row_each_and_their_mean_with_spread() -> None:
    second = replace(DROP_CELL, seed=1, perplexity={"WikiText-2": 34.0, "C4": 60.0})
    comparison = grid(DENSE_CELL, DROP_CELL, FAILED_CELL, second)
    table = text_table(comparison)
    assert [line[:2] for line in table.rows] == [
        ("dense", ""),
        ("drop", "0"),
        ("drop", "1"),
        ("drop", "mean"),
        ("sleb", "0"),
    ]
    mean = row(comparison, 3)
    # Sample standard deviation of 30 and 34.
    assert mean["WikiText-2"] == "32.00 \u00b1 2.83"
    assert mean["removed"] == "21.05% \u00b1 0.00%"
    assert mean["requested"] == "20%"


def test_models_and_compensations_are_told_apart() -> None:
    other = replace(DENSE_CELL, model="small", perplexity={"C4": 10.0})
    trained = replace(DROP_CELL, model="small", compensation="alpaca", perplexity={"C4": 15.0})
    comparison = grid(DENSE_CELL, DROP_CELL, other, trained)
    last = row(comparison, 3)
    assert (last["model"], last["method"]) == ("small", "drop + alpaca")
    assert last["C4"] == "15.00 (x 1.50)"  # compared with its own model


def test_the_terminal_shows_quality_cost_and_reasons() -> None:
    text = printed(COMPARISON, 110)
    assert "30.00 (x 1.50)" in text
    assert "1.25 (1.15-1.35)" in text
    assert "tiny, sleb at 20%, seed 0 failed: MethodError: tiny has no <layers>" in text
    assert "piqa" not in text
    assert "Single tasks are in the files." in text
    assert "in 1 h 1 min. 2 cores of a test." in text


def test_the_terminal_reads_no_markup_from_names() -> None:
    odd = replace(DROP_CELL, method="[red]x[/red]")
    assert "[red]x[/red]" in printed(grid(DENSE_CELL, odd), 140)


@pytest.mark.parametrize(
    "name", ["a|b", "<b>x</b>", "*x*", "_x_", "&lt;", "`x", "two\nlines", "back\\slash"]
)
def test_markdown_shows_any_name_as_it_is(name: str) -> None:
    html = (
        MarkdownIt()
        .enable("table")
        .render(markdown_text(grid(DENSE_CELL, replace(DROP_CELL, method=name))))
    )
    shown = " ".join(name.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}</td>" in html.replace(' style="text-align:left"', "")
    assert html.count("<tr>") == 3


def test_zeros_are_shown_beside_what_is_removed() -> None:
    sparse = replace(DROP_CELL, method="wanda", removed=0.0, zeros=0.2004)
    comparison = grid(DENSE_CELL, DROP_CELL, sparse)
    assert "zeros" not in row(COMPARISON, 1)
    rows = [row(comparison, place) for place in (1, 2)]
    shown = [(found["removed"], found["zeros"]) for found in rows]
    assert shown == [("21.05%", ""), ("0.00%", "20.04%")]
    assert "They are stored like all others, so these models are no smaller." in markdown_text(
        comparison
    )
    *_, line = csv.DictReader(io.StringIO(csv_text(comparison)))
    assert (line["removed_ratio"], line["zero_ratio"]) == ("0.0", "0.2004")


def test_names_in_markdown_stay_readable() -> None:
    assert "| arc_easy |" in markdown_text(COMPARISON)


def test_csv_parses_back_to_the_raw_numbers() -> None:
    dense, drop, failed = csv.DictReader(io.StringIO(csv_text(COMPARISON)))
    assert (drop["method"], drop["folder"]) == ("drop", "cells/tiny-drop-0.2-0")
    numbers = {
        "requested_ratio": 0.2,
        "removed_ratio": 0.2105,
        "perplexity.WikiText-2": 30.0,
        "perplexity_factor.C4": 2.0,
        "task.piqa": 0.5,
        "task.piqa_difference": -0.25,
        "task.piqa_difference_stderr": 0.25,
        "task_mean": 0.375,
        "task_mean_difference": -0.25,
        "share_of_dense": 0.6,
        "bytes": 4e8,
        "prefill_ratio": 1.25,
        "decode_ratio_third_quartile": 1.3,
        "seconds": 75.0,
        "peak_memory_bytes": 1.5e9,
        "paper.mean": 0.4,
    }
    assert {name: float(drop[name]) for name in numbers} == numbers
    assert dense["perplexity_factor.C4"] == dense["prefill_ratio"] == ""
    assert failed["error"] == "MethodError: tiny has no <layers>"


def test_a_trained_cell_shows_its_training() -> None:
    trained = replace(
        DROP_CELL,
        compensation="lora",
        validation_loss=2.0034,
        trained_tokens=92_638,
        tokens_per_second=1181.4,
        trainable_parameters=8_576_768,
    )
    content = grid(DENSE_CELL, DROP_CELL, trained)
    shown = row(content, 2)
    assert shown["validation loss"] == "2.003"
    assert shown["training, tokens/s"] == "1,181"
    assert row(content, 1)["validation loss"] == row(content, 0)["training, tokens/s"] == ""
    assert "validation loss" not in row(grid(DENSE_CELL, DROP_CELL), 1)
    *_, last = csv.DictReader(io.StringIO(csv_text(content)))
    assert (last["trained_tokens"], last["trainable_parameters"]) == ("92638", "8576768")
    assert (last["validation_loss"], last["tokens_per_second"]) == ("2.0034", "1181.4")


def test_csv_keeps_its_columns_when_nothing_was_measured() -> None:
    (line,) = csv.DictReader(io.StringIO(csv_text(grid(FAILED_CELL))))
    assert list(line) == [
        *("model", "method", "compensation", "seed"),
        *("requested_ratio", "removed_ratio", "zero_ratio"),
        *("task_mean", "task_mean_stderr", "task_mean_difference", "task_mean_difference_stderr"),
        *("share_of_dense", "validation_loss", "bytes"),
        *("prefill_ratio", "prefill_ratio_first_quartile", "prefill_ratio_third_quartile"),
        *("decode_ratio", "decode_ratio_first_quartile", "decode_ratio_third_quartile"),
        *("seconds", "peak_memory_bytes", "trained_tokens", "tokens_per_second"),
        *("trainable_parameters", "folder", "error"),
    ]
