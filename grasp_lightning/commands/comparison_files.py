"""The files of a grid in its output folder."""

from functools import partial
from pathlib import Path

from grasp_lightning.reporting.comparison.files import comparison_files
from grasp_lightning.reporting.comparison.results import Comparison
from grasp_lightning.run_folder import write_file


def write_comparison(comparison: Comparison, folder: Path) -> tuple[Path, ...]:
    """Write table, plots and page, each file at once, and return them; the page is last."""
    files = {folder / name: text for name, text in comparison_files(comparison).items()}
    for file, text in files.items():
        write_file(file, partial(_write, text))
    return tuple(files)


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
