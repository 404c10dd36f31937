"""The bars of a run as a user sees them: its stages in order, up to 100 %, and no others."""

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv
from tests.integration.forked import killed
from tests.integration.killing import ROOT, Kill

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_STAGE = re.compile(r"\[(\d+)/(\d+)\] ([a-z ]+[a-z])")
OnTerminal = Callable[[list[str]], tuple[int, str]]
STAGES = [
    *("load model and text", "perplexity before", "measure curvature", "choose ranks"),
    *("measure cuts", "refit", "perplexity after", "save", "verify"),
]


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> OnTerminal:
    """Run the program with a terminal as its standard error; return exit code and output there."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def run(argv: list[str]) -> tuple[int, str]:
        with contextlib.redirect_stderr(Terminal()) as terminal:
            code = main(argv)
        return code, terminal.getvalue()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=256)


def settings(model: Path, folder: Path) -> list[str]:
    return [
        f"--model.path={model}",
        f"--output_dir={folder / 'run'}",
        "--calibration.source=pydoc",
        "--calibration.num_samples=8",
        "--calibration.seqlen=48",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=3",
        "--evaluation.seqlen=48",
    ]


def stages(text: str) -> list[str]:
    """Return the stages that were drawn, without repetitions, after a check of their numbers."""
    found = [match.groups() for match in _STAGE.finditer(_ESCAPES.sub("", text))]
    numbers = [int(number) for number, _, _ in found]
    assert numbers == sorted(numbers)
    return [label for label, _ in groupby(label for _, _, label in found)]


def test_a_compression_shows_its_stages_and_ends_at_100_percent(
    model: Path, tmp_path: Path, on_terminal: OnTerminal
) -> None:
    code, shown = on_terminal(["compress", *settings(model, tmp_path)])
    assert code == 0
    assert stages(shown) == STAGES
    assert "measuring curvature" in shown  # a pass below it
    last = _ESCAPES.sub("", shown).rstrip().splitlines()[-1]
    assert "[9/9] verify" in last
    assert "100 %" in last


def test_a_compensation_shows_its_stages(
    model: Path, tmp_path: Path, on_terminal: OnTerminal
) -> None:
    argv = [
        *compensate_argv(model, tmp_path),
        f"--output_dir={tmp_path / 'run'}",
        *("--lora.rank=4", "--training.max_steps=2"),
    ]
    code, shown = on_terminal(["compensate", *argv])
    assert code == 0, shown
    shown = _ESCAPES.sub("", shown)
    assert "[3/6] train" in shown
    assert "tokens_per_second" in shown
    assert "100 %" in shown.rstrip().splitlines()[-1]


def test_a_failed_run_leaves_the_terminal_in_order(
    model: Path, tmp_path: Path, on_terminal: OnTerminal
) -> None:
    argv = [*settings(model, tmp_path), "--calibration.num_samples=100000000"]
    code, shown = on_terminal(["compress", *argv])
    assert code == 2
    assert stages(shown) == ["load model and text"]
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again
    assert "100 %" not in shown
    assert "error: calibration: num_samples" in shown.splitlines()[-1]


def test_a_log_has_no_bar_of_the_run_and_a_line_per_pass(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *settings(model, tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert _STAGE.search(out) is None
    assert out.count("measuring curvature") == 1


@pytest.mark.slow
def test_the_program_shows_no_bars_of_the_loaders(model: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    argv = [sys.executable, "cli.py", "compress", *settings(model, tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # tests set it
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as program:
        os.close(terminal)
        shown = b""
        while chunk := _read(controller):
            shown += chunk
    os.close(controller)
    assert program.returncode == 0
    text = _ESCAPES.sub("", shown.decode())
    assert "[9/9] verify" in text
    assert "Loading weights" not in text
    assert "model shards" not in text
    assert "it/s" not in text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


@pytest.mark.slow
def test_a_resumed_pass_begins_where_it_was_interrupted(
    model: Path, tmp_path: Path, on_terminal: OnTerminal
) -> None:
    argv = ["compress", *settings(model, tmp_path)]
    step = Kill("grasp_lightning.training.calibration", "CalibrationModule", "training_step", 5)
    assert killed(step, signal.SIGTERM, argv) == 128 + signal.SIGTERM
    code, shown = on_terminal(argv)
    assert code == 0
    assert "perplexity before" not in stages(shown)
    counts = re.findall(r"measuring curvature\W+(\d)/8", _ESCAPES.sub("", shown))
    assert counts[0] == "5"


@pytest.mark.slow
def test_a_resumed_training_begins_where_it_was_killed(
    model: Path, tmp_path: Path, on_terminal: OnTerminal
) -> None:
    argv = [
        *("compensate", *compensate_argv(model, tmp_path), f"--output_dir={tmp_path / 'run'}"),
        *("--lora.rank=4", "--training.max_steps=6", "--trainer.checkpoint_seconds=0"),
    ]
    module = "grasp_lightning.training.compensation.module"
    step = Kill(module, "CompensationModule", "training_step", 4)
    assert killed(step, signal.SIGKILL, argv) == -signal.SIGKILL
    code, shown = on_terminal(argv)
    assert code == 0
    assert stages(shown)[:2] == ["load model and text", "train"]
    counts = re.findall(r"training\W+(\d)/6", _ESCAPES.sub("", shown))
    assert counts[0] == "3"
