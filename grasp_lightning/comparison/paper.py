"""A paper's own numbers, from a YAML file."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from grasp_lightning.comparison.grid import Cell
from grasp_lightning.config import PaperConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import one_line
from grasp_lightning.reading.yaml_text import read_yaml

Columns = Mapping[str, float]
"""Numbers by column: a text, a task, or ``mean``."""

PaperNumbers = Mapping[tuple[str, str, float | None], Columns]
"""Columns by model, method (with training: ``method+compensation``) and removed share."""


def read_paper(config: PaperConfig) -> PaperNumbers:
    """Return the numbers of the table that a configuration names, none if it names no table.

    The file has tables; a table has models; a model has ``dense`` with its columns, and methods
    with the columns of each removed share, such as ``"0.2"``. A method that sets its own size has
    columns only.

    Raises:
        ConfigError: If only one of both keys is set, or the file does not have such a table.
    """
    if config.numbers is None and config.table is None:
        return {}
    if config.numbers is None or config.table is None:
        raise ConfigError("paper: set both paper.numbers and paper.table, or neither")
    file = Path(config.numbers).expanduser()
    if not file.is_file():
        raise ConfigError(f"paper.numbers: no such file: {config.numbers}")
    tables = _section(read_yaml(file, ConfigError, config.numbers), config.numbers)
    if config.table not in tables:
        names = ", ".join(map(str, tables))
        raise ConfigError(
            f"paper.table: {config.numbers} has no table {config.table}; it has: {names}"
        )
    return dict(_numbers(tables[config.table], f"{config.numbers}: {config.table}"))


def paper_columns(numbers: PaperNumbers, cell: Cell) -> Columns:
    """Return the paper's numbers for a cell, none if it has none."""
    method = cell.method if cell.compensation is None else f"{cell.method}+{cell.compensation}"
    return numbers.get((cell.model, method, cell.removed_ratio), {})


def _numbers(table: object, place: str) -> Iterator[tuple[tuple[str, str, float | None], Columns]]:
    for model, methods in _section(table, place).items():
        for method, values in _section(methods, f"{place}.{model}").items():
            where = f"{place}.{model}.{method}"
            content = _section(values, where)
            if content and all(map(_is_share, content)):
                for share, columns in content.items():
                    key = (str(model), str(method), float(str(share)))
                    yield key, _columns(columns, f"{where}.{share}")
            else:
                yield (str(model), str(method), None), _columns(content, where)


def _is_share(name: object) -> bool:
    return re.fullmatch(r"0?\.\d+", str(name)) is not None


def _section(content: object, place: str) -> Mapping[object, object]:
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: expected keys and values, got {one_line(repr(content))}")
    return content


def _columns(content: object, place: str) -> Columns:
    columns = {}
    for name, value in _section(content, place).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{place}.{name}: expected a number, got {one_line(repr(value))}")
        columns[str(name)] = float(value)
    return columns
