"""Ctrl-C ends the program with one line, whatever it is doing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import save_tiny
from tests.integration.forked import run_ranks
from tests.integration.killing import ROOT, Kill

# The program, but it sends itself Ctrl-C when a module is imported.
IMPORTING = """
import os, runpy, signal, sys
wanted, script = sys.argv[1:3]
def audit(event, arguments):
    if event == "import" and arguments[0] == wanted:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(audit)
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("name", ["torch", "transformers", "yaml"])
def test_ctrl_c_during_imports_is_one_line(name: str, tmp_path: Path) -> None:
    words = [name, str(ROOT / "cli.py"), "compress", "--model.path=nowhere"]
    words.append(f"--output_dir={tmp_path / 'run'}")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == (
        "error: interrupted while the program was starting: nothing was saved or changed\n"
    )
    assert not (tmp_path / "run").exists()


LOADING = Kill("grasp_lightning.commands.inputs", "", "load_model", 1)
MEASURING = Kill("grasp_lightning.training.calibration", "CalibrationModule", "training_step", 1)
STARTS_ANEW = "error: interrupted; nothing was saved, so the same command starts from the beginning"
RESUMES = (
    "error: interrupted; run the same command again without --overwrite: it resumes from what was "
    "saved"
)


@pytest.mark.parametrize(("place", "told"), [(LOADING, STARTS_ANEW), (MEASURING, RESUMES)])
@pytest.mark.slow
def test_an_interrupted_run_says_whether_anything_is_saved(
    place: Kill, told: str, tmp_path: Path
) -> None:
    argv = [
        *("compress", f"--model.path={save_tiny(tmp_path / 'tiny')}", "--method.name=grasp"),
        *("--method.num_layers=1", "--calibration.source=pydoc", "--calibration.num_samples=4"),
        *("--calibration.seqlen=32", "--evaluation.source=pydoc", "--evaluation.num_samples=2"),
        *("--evaluation.seqlen=32", f"--output_dir={tmp_path / 'run'}"),
    ]
    done = run_ranks(argv, 1, place, signal.SIGINT)
    assert done.codes == [128 + signal.SIGINT]
    assert done.text.splitlines()[-1] == told
    assert (tmp_path / "run").exists() == (told == RESUMES)
