"""The page of a grid: self-contained, well formed, and every value escaped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from grasp_lightning.commands.comparison_files import write_comparison
from grasp_lightning.errors import OutputError
from grasp_lightning.reporting.comparison.files import comparison_files
from grasp_lightning.reporting.comparison.results import Comparison
from tests.unit.reporting.comparison.example import (
    COMPARISON,
    DENSE_CELL,
    DROP_CELL,
    FAILED_CELL,
)
from tests.unit.reporting.test_page import HOSTILE, Page


def test_the_page_shows_values_reasons_and_plots() -> None:
    page = Page(comparison_files(COMPARISON)["compare.html"])
    assert page.open == []
    for expected in (
        "tiny",
        "30.00 (x 1.50)",
        "50.0 (-25.0 \u00b1 25.0)",
        "MethodError: tiny has no <layers>",
        "2 cores of a test",
        "1 h 1 min",
    ):
        assert expected in page.text
    assert len(page.all("img")) == 3
    assert all(image["alt"] for image in page.all("img"))


def test_the_page_needs_no_other_file() -> None:
    html = comparison_files(COMPARISON)["compare.html"]
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert all((image["src"] or "").startswith("data:image/svg+xml") for image in page.all("img"))
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_names_of_any_kind_are_text() -> None:
    cells = (
        replace(DENSE_CELL, model=HOSTILE, perplexity={HOSTILE: 2.0}),
        replace(DROP_CELL, model=HOSTILE, method=HOSTILE, perplexity={HOSTILE: 3.0}),
        replace(FAILED_CELL, model=HOSTILE, error=HOSTILE),
    )
    page = Page(comparison_files(replace(COMPARISON, cells=cells))["compare.html"])
    assert page.open == []
    assert not page.all("script")
    assert len(page.all("img")) == 3
    assert page.text.count(HOSTILE) >= 5


def test_all_files_are_written_and_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "grid"
    files = write_comparison(COMPARISON, folder)
    assert sorted(folder.iterdir()) == sorted(files)
    assert [file.name for file in files] == [
        *("comparison.json", "table.csv", "table.md"),
        *("perplexity.svg", "accuracy.svg", "speed.svg", "compare.html"),
    ]
    content = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert Comparison.from_dict(content, "comparison.json") == COMPARISON
    write_comparison(replace(COMPARISON, machine="another"), folder)
    assert "another" in (folder / "table.md").read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*comparison\.json"):
        write_comparison(COMPARISON, blocked)
