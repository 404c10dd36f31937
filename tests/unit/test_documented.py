"""The pages on errors and on the command line name what the program really has."""

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from grasp_lightning.config import (
    BenchmarkConfig,
    CompareConfig,
    CompensateConfig,
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    PlanConfig,
    TrimConfig,
)

ROOT = Path(__file__).parents[2]
ERRORS = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
COMMAND_LINE = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")

# Section of docs/command-line.md, the configuration whose keys it lists, and sections of keys that
# it only refers to.
KEYS: tuple[tuple[str, type[Any], tuple[str, ...]], ...] = (
    ("compress and plan", CompressConfig, ()),
    ("compress and plan", PlanConfig, ()),
    ("compensate", CompensateConfig, ("model", "evaluation", "trainer", "output_dir", "overwrite")),
    ("evaluate", EvaluateConfig, ("evaluation",)),
    ("benchmark", BenchmarkConfig, ("revision", "dtype", "device", "trust_remote_code")),
    ("compare", CompareConfig, ("calibration", "statistics", "trainer")),
    ("export", ExportConfig, ()),
    ("trim", TrimConfig, ("model",)),
)
OF_THE_SYSTEM = {"Killed"}


def templates() -> set[str]:
    """Every string of the library and the plugin but docstrings, with ... instead of values."""
    found = set()
    folders = (ROOT / "grasp_lightning", ROOT / "plugins/vllm/grasp_lightning_vllm")
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if node in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def messages() -> list[str]:
    """What the first column of the tables on errors quotes."""
    return [
        quoted
        for row in re.findall(r"^\| (`.*?) \|", ERRORS, re.MULTILINE)
        for quoted in re.findall(r"`([^`]+)`", row)
        if quoted not in OF_THE_SYSTEM
    ]


TEMPLATES = templates()


def test_many_messages_are_explained() -> None:
    assert len(messages()) >= 15


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_of_the_program(message: str) -> None:
    # A part of a message: ... stands for a value, or for more of the text.
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(template) for template in TEMPLATES), message


def leaves(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Names and fields of all keys, those of sections with a dot."""
    types = get_type_hints(kind)
    for key in fields(kind):
        if is_dataclass(types[key.name]):
            yield from leaves(types[key.name], f"{prefix}{key.name}.")
        else:
            yield prefix + key.name, key


def rows(section: str) -> dict[str, str]:
    """First cells of the tables of one section, without backticks, and the last cells."""
    text = COMMAND_LINE.partition(f"\n## Keys of {section}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in re.findall(r"^\| `.*\|$", text, re.MULTILINE)]
    return {cells[0].strip(" `"): cells[-1].strip(" |`") for cells in lines}


@pytest.mark.parametrize(("section", "kind", "elsewhere"), KEYS)
def test_every_key_has_a_row(section: str, kind: type[Any], elsewhere: tuple[str, ...]) -> None:
    documented = rows(section)
    keys = {name for name, _ in leaves(kind) if name.partition(".")[0] not in elsewhere}
    assert keys - documented.keys() == set()


@pytest.mark.parametrize(("section", "kind", "elsewhere"), KEYS)
def test_numbers_and_switches_have_the_right_defaults(
    section: str, kind: type[Any], elsewhere: tuple[str, ...]
) -> None:
    documented = rows(section)
    for name, key in leaves(kind):
        if name.partition(".")[0] in elsewhere or key.default is MISSING:
            continue
        if isinstance(key.default, bool):
            assert documented[name] == str(key.default).lower(), name
        elif isinstance(key.default, int | float):
            assert float(documented[name]) == key.default, name
