"""The commands of README.md are run, with a tiny model in place of a real one."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import COMMANDS
from grasp_lightning.config import (
    BenchmarkConfig,
    CompensateConfig,
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    PlanConfig,
)
from grasp_lightning.config.parsing import parse
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


CONFIGS: dict[str, type] = {
    "compress": CompressConfig,
    "compensate": CompensateConfig,
    "plan": PlanConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def program_lines() -> list[str]:
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    # What starts the program, python or torchrun with its own options, is left out.
    return [line.partition("cli.py ")[2].strip() for line in lines if "cli.py" in line]


@pytest.mark.parametrize("line", program_lines())
def test_every_command_line_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, *argv = shlex.split(line)
    assert command in COMMANDS
    if "--from_scores" in argv:  # begins with the configuration of that run
        argv.append("--model.path=smollm2")
    assert parse(CONFIGS[command], command, argv)


def test_make_has_the_two_commands() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["quickstart", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def run(
    code: str, replacements: dict[str, str], folder: Path, chdir: Callable[[Path], None]
) -> dict[str, object]:
    for old, new in replacements.items():
        assert old in code, f"README no longer says {old!r}"
        code = code.replace(old, new)
    chdir(folder)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
def test_the_python_form_compresses(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacements = {
        'path="smollm2"': f"path={str(tiny_folder)!r}",
        "seqlen=512": "seqlen=32",
        "num_layers=8": "num_layers=2",
    }
    names = run(blocks("python")[0], replacements, tmp_path, monkeypatch.chdir)
    model = getattr(names["loaded"], "model", None)
    assert isinstance(model, torch.nn.Module)
    dense = sum(p.numel() for p in tiny_model().parameters())
    assert sum(p.numel() for p in model.parameters()) < dense


@pytest.mark.filterwarnings("ignore")
def test_the_python_form_compensates(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacements = {
        "runs/quickstart/model": str(tiny_folder),
        "num_samples=64, seqlen=256": "num_samples=16, num_validation=0, seqlen=32",
    }
    run(blocks("python")[1], replacements, tmp_path, monkeypatch.chdir)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/by-hand/model")
    first, before = (next(iter(m.model.layers[0].parameters())) for m in (trained, tiny_model()))
    assert not torch.equal(first, before)


def test_loading_works_as_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacements = {"runs/quickstart/model": str(tiny_folder)}
    names = run(blocks("python")[2], replacements, tmp_path, monkeypatch.chdir)
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert type(names["model"]) is type(expected)
