"""Ctrl-C and SIGTERM end a run at the next safe moment."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grasp_lightning.errors import Interrupted

Handler = Callable[[int, FrameType | None], object] | int | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers SIGINT and SIGTERM until the next safe moment.

    Attributes:
        signal_number: The signal that came, None if none did.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._is_deferred = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle both signals for the duration of a ``with`` block, in the main thread only.

        Outside of ``deferred`` a signal raises ``Interrupted`` at once; inside, a second one does.

        Yields:
            Nothing.
        """
        earlier = self.take_over()
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def take_over(self) -> dict[signal.Signals, Handler]:
        """Handle both signals from now on, in the main thread only.

        A Trainer that starts puts a handler of its own around the one it finds, and ends in the
        middle of a validation by it.

        Returns:
            The handlers before; none outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._handle) for number in _SIGNALS}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep a signal until ``check`` is called, for the duration of a ``with`` block.

        Yields:
            Nothing.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self.check()

    def check(self) -> None:
        """End the run here if a signal came.

        Raises:
            Interrupted: If one did.
        """
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        is_first = self.signal_number is None
        self.signal_number = number
        if not (self._is_deferred and is_first):
            raise Interrupted(number)
