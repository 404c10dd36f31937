"""``compare`` as a user runs it: a grid, its table, and what happens when something ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import write_samples
from tests.integration.forked_jobs import start_forked
from tests.integration.killing import ROOT
from tests.unit.evaluation.test_harness import questions

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why.\n" * 40
METHODS = {"drop": {"name": "drop"}, "grasp_plus": {"name": "grasp_plus"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text and a task."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "tiny", max_position_embeddings=256)
    (folder / "text.txt").write_text(TEXT)
    (folder / "openbookqa").mkdir()
    rows = [json.dumps(row) + "\n" for row in questions()]
    (folder / "openbookqa" / "test.jsonl").write_text("".join(rows))
    write_samples(folder / "samples.jsonl")
    return folder


def write_config(file: Path, **changes: object) -> Path:
    content: dict[str, object] = {
        "output_dir": str(file.parent / file.stem),
        "removed_ratios": [0.2, 0.3],
        "models": {"tiny": {"path": "${INPUTS}/tiny", "dtype": "float32", "device": "cpu"}},
        "methods": METHODS,
        "calibration": {"source": "pydoc", "num_samples": 4, "seqlen": 32},
        "statistics": {"measured_windows": 0},
        "trainer": {"accelerator": "cpu", "checkpoint_seconds": 0},
        "texts": {
            "Fox": {"source": "file", "path": "${INPUTS}/text.txt", "num_samples": 2, "seqlen": 32}
        },
    }
    content |= changes
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return file


def variables_of(inputs: Path) -> dict[str, str]:
    return {"INPUTS": str(inputs), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Started(NamedTuple):
    """A command in a process of its own, and the files that it writes to."""

    process: BaseProcess
    output: Path
    errors: Path

    def end(self, seconds: float) -> tuple[int | None, str, str]:
        """Return exit code, output and errors."""
        self.process.join(seconds)
        return self.process.exitcode, self.output.read_text(), self.errors.read_text()


def start(config: Path, inputs: Path, *argv: str) -> Started:
    files = (config.with_suffix(".out"), config.with_suffix(".err"))
    words = ["compare", f"--config={config}", *argv]
    return Started(start_forked(words, variables_of(inputs), *files), *files)


def compare(config: Path, inputs: Path, *argv: str) -> tuple[int | None, str, str]:
    """Return exit code, output and errors."""
    return start(config, inputs, *argv).end(300)


def compare_in_interpreters(config: Path, inputs: Path, *argv: str) -> tuple[int, str, str]:
    """Do what ``compare`` does, the command and each of its jobs in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "compare", f"--config={config}", *argv],
        env=os.environ | variables_of(inputs),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    return done.returncode, done.stdout, done.stderr


def cells_of(config: Path) -> dict[str, dict[str, Any]]:  # Any: values of JSON
    folder = Path(yaml.safe_load(config.read_text())["output_dir"])
    content = json.loads((folder / "comparison.json").read_text())
    return {cell["folder"] or "dense": cell for cell in content["cells"]}


def times(folder: Path, *parts: str) -> dict[str, int]:
    return {
        str(file): file.stat().st_mtime_ns
        for part in parts
        for file in sorted((folder / part).rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def variables(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPUTS", str(inputs))


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": {"a": {"name": "drop", "keep_ration": 1}}}, "methods.a.keep_ration; did you"),
        ({"methods": {"a": {"name": "drup"}}}, "methods.a.name: expected one of"),
        ({"methods": {"a": {"name": "low_rank", "ranks": 3}}}, "methods.a.ranks: expected one of"),
        ({"methods": {"a": 3}}, "methods.a: expected a section of keys, got 3"),
        ({"removed_ratios": [1.2]}, "removed_ratios must hold numbers above 0 and below 1"),
        ({"removed_ratios": [0.1, 0.1]}, "removed_ratios contains a value more than once"),
        ({"models": {"a": {}}}, "models.a.path is not set"),
        ({"models": {"a": {"path": "./absent"}}}, "models.a.path: no such file or folder"),
        ({"texts": None}, "texts is not set"),
        ({"texts": {"a": {"source": "pydocs"}}}, "texts.a.source 'pydocs' is unknown"),
        ({"texts": {"a": {"source": "file", "path": "no.txt"}}}, "texts.a.path: no such file"),
        ({"texts": {"a": {"source": "pydoc", "seqlen": 1}}}, "texts.a.seqlen must be at least 2"),
        ({"calibration": {"source": "file", "path": "no.txt"}}, "calibration.path: no such file"),
        ({"tasks": {"names": ["x"], "removed_ratios": [0.9]}}, "tasks.removed_ratios contains 0.9"),
        ({"compensations": {"a": {"train": "some"}}}, "compensations.a.train: expected one of"),
        ({"compensations": {"a": {"text": {"seqlen": 9}}}}, "compensations.a: text.seqlen is 9"),
        ({"paper": {"table": "one"}}, "paper: set both paper.numbers and paper.table"),
        ({"cells": "5/4"}, "cells: expected a part such as 3/16"),
    ],
)
def test_a_bad_config_is_refused_before_anything_runs(
    changes: dict[str, object], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "a.yaml", **changes)
    assert main(["compare", f"--config={config}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert says in errors[0]
    assert not (tmp_path / "a").exists()


def test_a_variable_that_is_not_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INPUTS", raising=False)
    assert main(["compare", f"--config={write_config(tmp_path / 'a.yaml')}"]) == 2
    said = "models.tiny.path: the environment variable INPUTS is not set, which ${INPUTS}/tiny"
    assert said in capsys.readouterr().err


class Grid(NamedTuple):
    """A finished command; the cells of its comparison.json."""

    config: Path
    output: str
    errors: str
    cells: dict[str, dict[str, Any]]  # Any: values of JSON


@pytest.fixture(scope="module")
def grid(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """A grid in which one cell fails."""
    too_much = {"name": "grasp_plus", "removed_ratio": 0.95}
    config = write_config(
        tmp_path_factory.mktemp("grid") / "grid.yaml",
        methods={**METHODS, "too_much": too_much},
        tasks={
            "names": ["openbookqa"],
            "task_data": "${INPUTS}",
            "limit": 4,
            "removed_ratios": [0.3],
        },
        speed={
            "prefill_length": 16,
            "decode_batch_size": 1,
            "prompt_length": 4,
            "new_tokens": 2,
            "rounds": 2,
            "removed_ratios": [0.2],
        },
    )
    code, output, errors = compare(config, inputs)
    assert code == 3, output + errors
    return Grid(config, output, errors, cells_of(config))


@pytest.mark.slow
def test_a_cell_that_fails_is_a_row_with_its_reason(grid: Grid) -> None:
    config, output, errors, _ = grid
    cells = cells_of(config)
    assert len(cells) == 6
    failed = [cell for cell in cells.values() if cell["error"]]
    assert [cell["method"] for cell in failed] == ["too_much"]
    assert "out of reach" in failed[0]["error"]
    assert "\n" not in failed[0]["error"]
    assert f"failed: {failed[0]['error']}" in output
    assert errors.endswith("error: 1 cell failed; see above\n")
    assert "total time of all cells: 0 h" in output


@pytest.mark.slow
def test_cells_are_ordinary_runs_measured_as_asked(grid: Grid) -> None:
    config = grid.config
    for cell in cells_of(config).values():
        if cell["error"]:
            continue
        is_dense = cell["method"] == "dense"
        assert cell["perplexity"]["Fox"] > 1
        assert bool(cell["tasks"]) == (is_dense or cell["removed_ratio"] == 0.3)
        assert (cell["prefill"] is not None) == (cell["removed_ratio"] == 0.2)
        assert (cell["decode"] is not None) == (cell["removed_ratio"] == 0.2)
        if is_dense:
            assert cell["removed"] == 0
            continue
        run = config.parent / config.stem / cell["folder"]
        metrics = json.loads((run / "metrics.json").read_text())
        assert cell["removed"] == metrics["removed_ratio"]
        assert cell["bytes"] == metrics["bytes"]["compressed"]
        assert cell["peak_memory_bytes"] == metrics["peak_memory_bytes"]
        assert 0 < cell["seconds"] < metrics["seconds"]["total"]
    dense = cells_of(config)["dense"]["tasks"]["openbookqa"]
    for cell in cells_of(config).values():
        if cell["tasks"]:
            assert cell["tasks"]["openbookqa"]["documents"] == dense["documents"]


@pytest.mark.slow
def test_a_second_start_runs_nothing(grid: Grid, inputs: Path) -> None:
    config = grid.config
    content = yaml.safe_load(config.read_text())
    del content["methods"]["too_much"]
    finished = config.with_name("finished.yaml")
    finished.write_text(yaml.safe_dump(content))
    parts = (config.parent / "grid", "cells", "measurements", "logs", "models", "statistics")
    before = times(*parts)
    code, output, errors = compare(finished, inputs)
    assert code == 0, errors
    assert output.startswith("5 cells, 5 of them finished\n")
    assert times(*parts) == before

    # Another text is measured, and nothing is compressed again.
    content["texts"]["Again"] = {**content["texts"]["Fox"], "seqlen": 16}
    content |= {"methods": {"drop": METHODS["drop"]}, "removed_ratios": [0.2]}
    content["tasks"] = {}
    finished.write_text(yaml.safe_dump(content))
    cells = times(config.parent / "grid", "cells")
    assert compare(finished, inputs)[0] == 0
    assert times(config.parent / "grid", "cells") == cells
    assert [len(cell["perplexity"]) for cell in cells_of(finished).values()] == [2, 2]

    content["calibration"]["num_samples"] = 5
    finished.write_text(yaml.safe_dump(content))
    code, _, errors = compare(finished, inputs)
    assert code == 2
    assert "calibration.num_samples is 5 here and 4 in" in errors.splitlines()[-1]


@pytest.mark.slow
def test_two_parts_in_two_processes_equal_one_run(grid: Grid, inputs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "parts.yaml", methods={"drop": METHODS["drop"]})
    for part, command in (("1/2", compare), ("2/2", compare_in_interpreters)):
        code, output, errors = command(config, inputs, f"--cells={part}", "--jobs=2")
        assert code == 0, output + errors
        assert not (tmp_path / "parts" / "comparison.json").exists()
    code, output, _ = compare(config, inputs)
    assert code == 0
    assert output.startswith("3 cells, 3 of them finished\n")
    for name, cell in cells_of(config).items():
        assert cell["perplexity"]["Fox"] == pytest.approx(grid.cells[name]["perplexity"]["Fox"])
        plans = [file.parent / file.stem / name / "plan.json" for file in (config, grid.config)]
        assert name == "dense" or plans[0].read_bytes() == plans[1].read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(number) for number in text.split()]


@pytest.mark.slow
def test_a_grid_that_is_killed_at_three_moments_goes_on(inputs: Path, tmp_path: Path) -> None:
    short = {
        "data": {"source": "file", "path": "${INPUTS}/samples.jsonl", "num_validation": 6},
        "training": {"batch_size": 4, "micro_batch_size": 4, "max_steps": 3},
        "optimizer": {"warmup_steps": 1},
        "lora": {"rank": 4},
    }
    config = write_config(
        tmp_path / "killed.yaml",
        removed_ratios=[0.3],
        methods={"drop": METHODS["drop"]},
        compensations={"short": short, "longer": {**short, "after": "short"}},
    )
    folder = tmp_path / "killed"
    base = folder / "cells" / "tiny-drop-0.3-seed0"
    moments: tuple[tuple[int, Callable[[], bool]], ...] = (
        (signal.SIGINT, (folder / "logs" / "tiny-dense.log").exists),
        (signal.SIGTERM, (base / "manifest.json").exists),
        (signal.SIGKILL, (folder / "cells" / "tiny-drop-0.3-seed0-short" / "manifest.json").exists),
    )
    for number, moment in moments:
        started = start(config, inputs)
        pid = started.process.pid
        assert pid is not None
        wait_for(lambda moment=moment, pid=pid: moment() and children_of(pid) != [])  # type: ignore[misc]
        children = children_of(pid)
        os.kill(pid, number)
        code, _, errors = started.end(120)
        assert code == (-number if number == signal.SIGKILL else 128 + number), errors
        wait_for(lambda children=children: not any(map(is_running, children)))  # type: ignore[misc]
        assert not (folder / "comparison.json").exists()
    code, output, errors = compare(config, inputs)
    assert code == 0, output + errors
    cells = cells_of(config)
    assert len(cells) == 4
    before, after = (cells[f"cells/{base.name}{end}"] for end in ("", "-short"))
    assert after["compensation"] == "short"
    assert after["removed"] == before["removed"]
    assert after["seconds"] > before["seconds"]
    trained, metrics = (
        json.loads((folder / cell["folder"] / "metrics.json").read_text())
        for cell in (after, before)
    )
    assert after["validation_loss"] == trained["validation_loss"]["after"]
    assert after["trainable_parameters"] == trained["parameters"]["trainable"]
    for key in ("trained_tokens", "tokens_per_second"):
        assert after[key] == trained[key] > 0
        assert before[key] is None
    peaks = [content["peak_memory_bytes"] for content in (trained, metrics)]
    assert after["peak_memory_bytes"] == max(peaks)
    assert after["perplexity"]["Fox"] != before["perplexity"]["Fox"]
    longer = cells[f"cells/{base.name}-longer"]
    settings = yaml.safe_load((folder / longer["folder"] / "config.yaml").read_text())
    assert settings["model"]["path"] == str(folder / after["folder"] / "model")
    assert longer["trained_tokens"] == 2 * after["trained_tokens"]
    assert longer["seconds"] > after["seconds"]
    assert longer["validation_loss"] < after["validation_loss"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
