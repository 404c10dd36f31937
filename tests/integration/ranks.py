"""Runs the program in processes that are forked from one in which everything is imported."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.integration.killing import Kill

_SECONDS = 120
_PATIENCE = 20
_CONTEXT = multiprocessing.get_context("forkserver")
# Forked from a process that has never run a backward pass, which would forbid it.
_CONTEXT.set_forkserver_preload(["tests.integration.ranks_preload"])


class Outcome(NamedTuple):
    """How the processes of a run ended.

    Attributes:
        codes: Exit codes by rank.
        text: Their output, rank after rank.
    """

    codes: list[int | None]
    text: str


def run_ranks(
    argv: Sequence[object],
    number: int,
    folder: Path,
    kill: Kill | None = None,
    signal_number: int = signal.SIGKILL,
) -> Outcome:
    """Run a command in several processes, as torchrun would.

    Args:
        argv: The command line.
        number: How many processes.
        folder: Where they write their output.
        kill: Where all of them send themselves a signal.
        signal_number: The signal.

    Returns:
        How they ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in argv]
    logs = [folder / f"rank{rank}.log" for rank in range(number)]
    ranks = [
        _CONTEXT.Process(
            target=_run_rank, args=(words, rank, number, port, log, kill, signal_number)
        )
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
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
    return Outcome(
        [process.exitcode for process in ranks], "\n".join(log.read_text() for log in logs)
    )


def _run_rank(  # noqa: PLR0917  what a process is given
    words: list[str],
    rank: int,
    number: int,
    port: int,
    log: Path,
    kill: Kill | None,
    signal_number: int,
) -> None:
    file = log.open("w")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    if number > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if kill is not None:
        _kill_at(kill, signal_number)
    main = import_module("grasp_lightning.cli").main
    sys.exit(main(words))


def _kill_at(kill: Kill, signal_number: int) -> None:
    target = getattr(import_module(kill.module), kill.owner)
    original, calls = getattr(target, kill.name), [0]

    def counting(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == kill.call:
            os.kill(os.getpid(), signal_number)
        return original(*args, **kwargs)

    setattr(target, kill.name, counting)
