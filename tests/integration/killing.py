"""Runs of the program in processes that end themselves in the middle."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Counts the calls of one function and sends its own process a signal at one of them.
CHILD = textwrap.dedent("""
    import os, sys
    import torch
    torch.set_num_threads(1)
    from importlib import import_module
    from grasp_lightning.cli import run_program

    where, owner, name, count, number = sys.argv[1:6]
    target = getattr(import_module(where), owner) if owner else import_module(where)
    original, calls = getattr(target, name), [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count):
            os.kill(os.getpid(), int(number))
        return original(*args, **kwargs)

    setattr(target, name, counting)
    run_program(sys.argv[6:])
""")


class Kill(NamedTuple):
    """Where a process sends itself a signal.

    Attributes:
        module: Module that holds the function.
        owner: Class that has it as a method; empty for a function of the module.
        name: The function.
        call: Number of the call at which it happens, before the function does its work.
    """

    module: str
    owner: str
    name: str
    call: int


def killed(kill: Kill, number: int, argv: list[str], *, path: Sequence[Path] = ()) -> int:
    """Run the program in a process that sends itself a signal, and return its exit code."""
    words = [sys.executable, "-c", CHILD, *map(str, kill), str(int(number)), *argv]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    return subprocess.run(words, env=environment, capture_output=True, check=False).returncode
