"""The grids of the paper's tables find the paper's numbers."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grasp_lightning.comparison.grid import grid_cells
from grasp_lightning.comparison.paper import paper_columns, read_paper
from grasp_lightning.config import CompareConfig
from grasp_lightning.config.parsing import parse
from grasp_lightning.evaluation.results import PAPER_SEVEN
from grasp_lightning.reading.yaml_text import read_yaml

FOLDER = Path(__file__).parents[3] / "configs/compare"
NUMBERS: dict[str, Any] = read_yaml(FOLDER / "paper_numbers.yaml")
CONFIGS: dict[str, dict[str, Any]] = {
    file.stem.removeprefix("paper_"): read_yaml(file)
    for file in sorted(FOLDER.glob("paper_table*.yaml"))
}
TABLES = [f"table{number}" for number in (1, 2, 3, 5, 8, 9, 10, 12, 13)]
MEAN_ERROR = 0.012  # values of two digits, and some of the paper's own slips
LLAMA = "LLaMA-3.1-8B-Instruct"
TRAINED_IN_PAPER = {"grasp+alpaca"}
# Cells that the paper's table does not have.
WITHOUT_NUMBERS = {
    *((table, LLAMA, "dense") for table in ("table5", "table10", "table12", "table13")),
    ("table2", "LLaMA-2-7B", "grasp"),
    ("table9", LLAMA, "svd_llm"),
}


def cells(config: dict[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """Yield model, method and share, as keys of the file of numbers."""
    for model in config["models"]:
        yield model, "dense", None
        for method, options in config["methods"].items():
            is_sized = options.keys() & {"num_layers", "removed_ratio"}
            ratios = [None] if is_sized else [f"{share:g}" for share in config["removed_ratios"]]
            for name in (method, *(f"{method}+{name}" for name in config.get("compensations", ()))):
                for ratio in ratios:
                    yield model, name, ratio


def numbers(table: str, model: str, method: str, ratio: str | None) -> dict[str, float]:
    columns = NUMBERS[table].get(model, {}).get(method, {})
    found: dict[str, float] = columns if ratio is None else columns.get(ratio, {})
    return found


def all_columns() -> Iterator[tuple[str, dict[str, float]]]:
    for table, models in NUMBERS.items():
        for model, methods in models.items():
            for method, values in methods.items():
                sized = (
                    values if set(values) <= {"0.2", "0.25", "0.3", "0.4", "0.5"} else {"": values}
                )
                for ratio, columns in sized.items():
                    yield f"{table} {model} {method} {ratio}", columns


def test_there_is_a_grid_for_each_table() -> None:
    assert sorted(CONFIGS) == sorted(TABLES)
    for table, config in CONFIGS.items():
        assert config["paper"] == {"numbers": "configs/compare/paper_numbers.yaml", "table": table}
        assert config["output_dir"] == f"runs/compare/paper_{table}"


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_finds_its_numbers_unless_the_paper_has_none(table: str) -> None:
    missing = {
        (table, model, method)
        for model, method, ratio in cells(CONFIGS[table])
        if not numbers(table, model, method, ratio)
    }
    trained = {key for key in missing if "+" in key[2] and key[2] not in TRAINED_IN_PAPER}
    assert missing - trained == {key for key in WITHOUT_NUMBERS if key[0] == table}


@pytest.mark.parametrize("table", NUMBERS)
def test_every_number_belongs_to_a_cell(table: str) -> None:
    config = CONFIGS[table.partition("_")[0]]
    found = [numbers(table, *cell) for cell in cells(config)]
    named = {
        f"{table} {model} {method} {ratio or ''}": numbers(table, model, method, ratio)
        for model, method, ratio in cells(config)
        if numbers(table, model, method, ratio)
    }
    assert dict(entry for entry in all_columns() if entry[0].startswith(f"{table} ")) == named
    assert any(found)


@pytest.mark.parametrize("table", TABLES)
def test_the_command_reads_the_same_numbers(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    file = f"configs/compare/paper_{table}.yaml"
    config = parse(CompareConfig, "cli.py compare", [f"--config={file}"])
    paper = read_paper(config.paper)
    for cell in grid_cells(config):
        method = cell.method if cell.compensation is None else f"{cell.method}+{cell.compensation}"
        ratio = None if cell.removed_ratio is None else f"{cell.removed_ratio:g}"
        assert paper_columns(paper, cell) == numbers(table, cell.model, method, ratio)


@pytest.mark.parametrize("table", NUMBERS)
def test_columns_are_measured_by_the_grid_or_have_no_task_in_lm_eval(table: str) -> None:
    config = CONFIGS[table.partition("_")[0]]
    measured = {*config["texts"], *config["tasks"]["names"], "mean", "percent", "seconds"}
    measured |= {"c3", "cmnli", "chid", "race_m", "mean of twelve", "percent of twelve"}
    for place, columns in all_columns():
        if place.startswith(f"{table} "):
            assert columns.keys() <= measured, place


def test_means_are_those_of_the_tasks() -> None:
    checked = 0
    for place, columns in all_columns():
        tasks = [name for name in (*PAPER_SEVEN, "gsm8k") if name in columns]
        if "mean" in columns and tasks:
            mean = statistics.fmean(columns[task] for task in tasks)
            assert columns["mean"] == pytest.approx(mean, abs=MEAN_ERROR), place
            checked += 1
    assert checked == 5 + 21 + 20 + 2 + 4
