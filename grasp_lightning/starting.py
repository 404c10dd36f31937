"""Ctrl-C while the program is still loading: one line, at once."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

_LINE = b"error: interrupted while the program was starting: nothing was saved or changed\n"
_SCRIPTS = ("-m", "grasp-lightning")  # what sys.argv begins with while a script imports the package
_CHECKOUT_SCRIPT = Path(__file__).resolve().parents[1] / "cli.py"


def is_program() -> bool:
    """Return whether the package is imported to run the program, not by other code."""
    script = Path(getattr(sys, "argv", [""])[0])
    return script.name in _SCRIPTS or script.resolve() == _CHECKOUT_SCRIPT


def leave_on_interrupt() -> None:
    """End the process at the first Ctrl-C, until ``begin``.

    Raised during an import, an exception could be swallowed, or end in pages of traceback.
    """
    signal.signal(signal.SIGINT, _leave)


def begin() -> None:
    """Undo ``leave_on_interrupt``: from now on Ctrl-C raises ``KeyboardInterrupt``."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    os.write(2, _LINE)
    os._exit(128 + number)
