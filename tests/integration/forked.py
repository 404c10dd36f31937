"""Runs the program in processes that are forked from one in which everything is imported.

A fresh process would import for nine seconds, and so would the one that verifies the saved model.
Here a fork verifies it, which has seen no model either; other tests verify by a fresh process.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from grasp_lightning.models import reloading
from tests.integration.killing import Kill

_SECONDS = 300
_PATIENCE = 20
CONTEXT = multiprocessing.get_context("forkserver")
# Forked from a process that has never run a backward pass, which would forbid it.
CONTEXT.set_forkserver_preload(["tests.integration.forked_preload"])
FORK = multiprocessing.get_context("fork")


class Outcome(NamedTuple):
    """How the processes of a run ended.

    Attributes:
        codes: Exit codes by rank.
        text: What they wrote, rank after rank.
    """

    codes: list[int | None]
    text: str


def run_ranks(
    argv: Sequence[object],
    number: int,
    kill: Kill | None = None,
    signal_number: int = signal.SIGKILL,
    path: Sequence[Path] = (),
) -> Outcome:
    """Run a command in several processes, as torchrun would, or in a single one.

    Args:
        argv: The command line.
        number: How many processes.
        kill: Where all of them send themselves a signal.
        signal_number: The signal.
        path: Folders that they import from, too.

    Returns:
        How they ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name) / f"rank{rank}.log" for rank in range(number)]
        ranks = []
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | several if number > 1 else {}
            environment = {**os.environ, **own}
            given = ([str(word) for word in argv], environment, log, kill, signal_number, path)
            ranks.append(CONTEXT.Process(target=_run_rank, args=given))
            ranks[-1].start()
        try:
            for process in ranks:
                process.join(_SECONDS)
                if process.exitcode != 0:
                    break
        finally:
            for process in ranks:  # one that waits for another that has failed
                process.join(_PATIENCE)
                process.kill()
                process.join()
        text = "\n".join(log.read_text() for log in logs)
    return Outcome([process.exitcode for process in ranks], text)


def killed(
    kill: Kill, signal_number: int, argv: Sequence[object], *, path: Sequence[Path] = ()
) -> int | None:
    """Run the program in a process that sends itself a signal, and return its exit code."""
    (code,) = run_ranks(argv, 1, kill, signal_number, path).codes
    return code


def _run_rank(  # noqa: PLR0917  what a process is given
    words: list[str],
    environment: dict[str, str],
    log: Path,
    kill: Kill | None,
    signal_number: int,
    path: Sequence[Path],
) -> None:
    file = log.open("w")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ |= environment
    sys.path[:0] = map(str, path)
    verification: Any = import_module("grasp_lightning.models.verification")
    verification._exit_code = _verifier()
    if kill is not None:
        kill.arm(signal_number)
    import_module("grasp_lightning.cli").run_program(words)


def _verifier() -> Callable[[Path, float], int | None]:
    """Return what stands in for ``verification._exit_code`` in a rank.

    Once a rank has the threads of a process group, no fork of it survives. So the process that
    forks for each saved model is forked now, and ends with the rank.
    """
    ours, theirs = FORK.Pipe()
    if os.fork() == 0:
        ours.close()
        _answer_all(theirs)
        os._exit(0)
    theirs.close()

    def exit_code(request: Path, seconds: float) -> int | None:
        ours.send((request, seconds))
        code: int | None = ours.recv()
        return code

    return exit_code


def _answer_all(pipe: Connection) -> None:
    while True:
        try:
            request, seconds = pipe.recv()
        except EOFError:
            return
        pipe.send(verified_by_a_fork(request, seconds))


def verified_by_a_fork(request: Path, seconds: float) -> int | None:
    """Stand in for ``verification._exit_code`` where there are no process groups."""
    process = FORK.Process(target=reloading._answer, args=(request,))
    process.start()
    process.join(seconds)
    return process.exitcode
