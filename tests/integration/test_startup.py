"""What needs no model answers before the heavy packages are imported."""

import json
import signal
import subprocess
import sys

import pytest

from grasp_lightning import __version__
from tests.integration.killing import ROOT

HEAVY = ["torch", "transformers", "lightning", "datasets", "matplotlib", "numpy", "peft", "scipy"]
# The program, which tells at its end what it has imported.
RUN = f"""
import atexit, json, os, runpy, sys
def tell():
    sys.stderr.write(json.dumps(sorted(set({HEAVY}) & set(sys.modules))))
atexit.register(tell)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*words: str) -> tuple[int, str, str, list[str]]:
    """Return exit code, output, error and heavy packages of the program in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / "cli.py"), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    error, _, imported = done.stderr.rpartition("[")
    return done.returncode, done.stdout, error, json.loads(f"[{imported}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--help"], "usage: cli.py COMMAND"),
        (["--version"], f"grasp-lightning {__version__}"),
        (["compress", "--help"], "--method.removed_ratio"),
        (["compensate", "--help"], "--lora"),
        (["benchmark", "--help"], "--rounds"),
        (["trim", "--help"], "--corpora"),
        (["plan", "--print_config"], "removed_ratio"),
        (["completion", "zsh"], "compdef"),
    ],
)
def test_help_imports_no_heavy_package(words: list[str], says: str) -> None:
    code, output, error, imported = run(*words)
    assert (code, error, imported) == (0, "", [])
    assert says in output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no command"),
        (["squeeze"], "unknown command 'squeeze'"),
        (["compress", "--method.removed_rato=0.2"], "did you mean method.removed_ratio?"),
        (["compress", "--method.removed_ratio=much"], "expected a number"),
        (["compensate", "--train=most"], "expected one of lora"),
        (["plan", "--metod.name=grasp"], "unknown option --metod.name"),
        (["plan", "--model.path=a", "--evaluation.seqlen=1"], "must be at least 2"),
        (["plan", "--config=nowhere.yaml"], "no such file"),
        (["evaluate", "--modell=a"], "did you mean model?"),
        (["compress", "--model.path=a", "--output_dir=b", "--trainer.num_nodes=2"], "torchrun"),
        (["plan", "--model.path=./nowhere"], "model.path: no such file or folder: ./nowhere"),
        (["compress", "--model.path=cli.py"], "cli.py is a file; expected a folder"),
        (["compensate", "--model.path=./nowhere"], "model.path: no such file or folder"),
        (["trim", "--corpora=pydoc", "--output_dir=b", "--model.path=./nowhere"], "no such file"),
        (["export", "--format=onnx"], "expected one of dense, gguf, torchao, bitsandbytes"),
    ],
)
def test_bad_input_is_refused_before_a_heavy_package_is_imported(
    words: list[str], says: str
) -> None:
    code, output, error, imported = run(*words)
    assert (code, output, imported) == (2, "", [])
    assert says in error
    assert error.count("\n") == 1


def test_a_reader_that_ends_early_causes_no_traceback() -> None:
    words = [sys.executable, str(ROOT / "cli.py"), "--help"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert process.stderr.read() == ""
