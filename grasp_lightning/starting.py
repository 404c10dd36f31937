"""Ctrl-C while the program is still loading: one line, at once."""

import os
import signal
from types import FrameType

_LINE = b"error: interrupted while the program was starting: nothing was saved or changed\n"


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
