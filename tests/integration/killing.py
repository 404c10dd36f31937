"""Runs of the program that send themselves a signal in the middle."""

import os
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


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

    def arm(self, signal_number: int) -> None:
        """Change the function so that it sends the signal."""
        module = import_module(self.module)
        target = getattr(module, self.owner) if self.owner else module
        original, calls = getattr(target, self.name), [0]

        def counting(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == self.call:
                os.kill(os.getpid(), signal_number)
            return original(*args, **kwargs)

        setattr(target, self.name, counting)
