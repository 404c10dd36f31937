"""Runs a program of ``benchmarks/``, and the processes that it measures, as forks.

Each of them would otherwise be a fresh interpreter, which imports for nine seconds.
"""

import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.integration.forked import CONTEXT, FORK
from tests.integration.killing import ROOT

BENCHMARKS = ROOT / "benchmarks"
_SECONDS = 600


def run_benchmark(program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder."""
    words = [str(BENCHMARKS / program), *map(str, arguments)]
    output, errors = (cwd / f"{program}.{name}" for name in ("out", "err"))
    process = CONTEXT.Process(target=_run, args=(words, cwd, output, errors))
    process.start()
    process.join(_SECONDS)
    process.kill()
    process.join()
    assert process.exitcode is not None
    texts = output.read_text(), errors.read_text()
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _run(words: list[str], cwd: Path, output: Path, errors: Path) -> None:
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.argv[:] = words
    sys.path.insert(0, str(BENCHMARKS))
    multiprocessing: Any = import_module("multiprocessing")
    multiprocessing.get_context = lambda _=None: FORK
    runpy.run_path(words[0], run_name="__main__")
