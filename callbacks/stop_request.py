"""Ctrl-C, SIGTERM and SLURM's warning end a run at the next safe moment."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from grasp_lightning import processes
from grasp_lightning.callbacks.requeue import REQUEUE_SIGNAL, is_slurm_job
from grasp_lightning.errors import Interrupted

Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Remembers SIGINT, SIGTERM and, in a SLURM job, SIGUSR1 until the next safe moment.

    SIGUSR1 asks for an end after which the job is requeued (``requeue_job``). The last of several
    signals counts, but SIGUSR1 never overrides another one: a cancelled job must not come back.

    SLURM sends SIGTERM up to three times within milliseconds, so a repeated signal does not
    interrupt what the first one started, except for a second Ctrl-C.

    Attributes:
        signal_number: The signal that counts, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._is_deferred = False
        self._ends = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals during a ``with`` block, in the main thread only.

        Outside of ``deferred`` a signal raises ``Interrupted`` at once; inside, a second Ctrl-C
        does. When SIGUSR1 has ended the block, the handlers stay, so that no signal can end the
        process before ``requeue_job`` is called.
        """
        earlier = self.take_over()
        try:
            yield
        finally:
            if not (self._ends and self.signal_number == REQUEUE_SIGNAL):
                for number, handler in earlier.items():
                    signal.signal(number, handler)

    def take_over(self) -> dict[signal.Signals, Handler]:
        """Handle the signals from now on, and return the previous handlers; main thread only.

        A Trainer wraps the handler that it finds in its own, which would end a run in the middle
        of a validation.
        """
        if threading.current_thread() is not threading.main_thread():
            return {}
        numbers = [signal.SIGINT, signal.SIGTERM]
        if is_slurm_job():
            numbers.append(REQUEUE_SIGNAL)
        return {number: signal.signal(number, self._handle) for number in numbers}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals until ``check`` is called, during a ``with`` block.

        Raises:
            Interrupted: If a signal was received, even if another process ended because of it.
            RuntimeError: Any other one from the block.
        """
        self._is_deferred = True
        try:
            yield
        except RuntimeError as error:
            # torch raises no narrower class if a process waits for another one that has died.
            if self.signal_number is None or processes.num_processes() == 1:
                raise
            self._ends = True
            raise Interrupted(self.signal_number) from error
        finally:
            self._is_deferred = False
        self.check()

    def agreed(self) -> int | None:
        """Return the same signal in all processes, or None; all of them must call it together.

        If one process ended alone, others would wait for its part of a model.
        """
        told = [number for number in processes.gather(self.signal_number) if number is not None]
        ends = [number for number in told if number != REQUEUE_SIGNAL]
        number = next(iter(ends or told), None)
        if number is not None:  # a signal that arrives meanwhile counts next time
            self.signal_number = number
        return number

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal was received."""
        if self.signal_number is not None:
            self._ends = True
            raise Interrupted(self.signal_number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        is_impatient = number == signal.SIGINT and self.signal_number == signal.SIGINT
        if self.signal_number is None or not (self._ends or number == REQUEUE_SIGNAL):
            self.signal_number = number
        if not self._ends:
            # A Trainer's handler talks to other processes, which may have ended already.
            self.take_over()
        if is_impatient or not (self._is_deferred or self._ends):
            self.check()
