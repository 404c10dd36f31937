"""Runs ``compare`` forked from a process in which everything is imported, and forks its jobs.

Jobs are children of the command, as ever: signals, exit codes and the death of the parent reach
them. Only the imports of fresh interpreters are saved.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tests.integration.forked import CONTEXT, FORK, verified_by_a_fork

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start_forked(
    argv: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path
) -> BaseProcess:
    """Start a command whose jobs are forks; it writes to two files."""
    given = (list(argv), {**os.environ, **environment}, output, errors)
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def _run(argv: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ |= environment
    verification: Any = import_module("grasp_lightning.models.verification")
    verification._exit_code = verified_by_a_fork
    pool: Any = import_module("grasp_lightning.comparison.pool")
    pool.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _Fork})
    import_module("grasp_lightning.cli").run_program(argv)


class _Fork:
    """Stands in for the ``Popen`` of a job, ``python -m MODULE ...``."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: object
    ) -> None:
        given = (argv[2], list(argv[3:]), dict(env), stdout.fileno())
        self._process = FORK.Process(target=_run_job, args=given)
        # A signal waits until the job has handlers of its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run_job(module: str, words: list[str], environment: dict[str, str], log: int) -> None:
    os.setsid()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ |= environment
    if module == "grasp_lightning":
        import_module("grasp_lightning.cli").run_program(words)
    sys.exit(import_module(module).main(words))
