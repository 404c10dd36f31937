"""A result that is no run folder: one JSON file, and a plot beside it."""

import json
import os
from pathlib import Path

from grasp_lightning.errors import ConfigError, OutputError

_KEYS = {"workload", "machine", "models"}


class ResultFiles:
    """Where a benchmark's result goes, after a check that it may be written there.

    Only what an earlier benchmark wrote is written over: a mistyped ``output`` must not cost a
    model its config.json.

    Args:
        output: The JSON file, as the user named it.
        overwrite: Write over an earlier result.

    Attributes:
        output: The JSON file.
        plot: The plot of the same name.

    Raises:
        ConfigError: If the name does not end in .json.
    """

    def __init__(self, output: str, overwrite: bool) -> None:
        self.output = Path(output).expanduser()
        if self.output.suffix != ".json":
            raise ConfigError(f"output: expected a file name that ends in .json, got {output!r}")
        self.plot = self.output.with_suffix(".png")
        for file in (self.output, self.plot):
            _check_free(file, overwrite)
        if self.output.exists() or self.plot.exists():
            _check_is_result(self.output)
        check_parent(self.output)


def _check_free(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise OutputError(f"output: {file} is a folder, expected a file to write")
    if file.exists() and not overwrite:
        raise OutputError(f"output: {file} exists; name another output or use --overwrite")


def _check_is_result(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise OutputError(
            f"output: {file} is no result of benchmark and is in the way; name another output"
        )


def check_parent(file: Path) -> None:
    """Refuse a file whose folder can be neither written nor made.

    Args:
        file: Where something will be written.

    Raises:
        OutputError: If a parent is a file, or forbids writing.
    """
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise OutputError(f"output: {folder} is a file, expected a folder to write in")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"output: cannot write in {folder}: permission denied")
