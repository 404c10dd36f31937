"""Saves a running calibration pass, so that a killed or interrupted run goes on where it was."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import lightning as L
from torch import Tensor

from callbacks.measurement import Measurement
from grasp_lightning.errors import Interrupted


class PassStore(Protocol):
    """Keeps the state of the pass that runs, and no other."""

    def load(self) -> dict[str, Tensor] | None:
        """Return the state that was saved for this pass, or None."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Save the state of this pass in one step, in place of an earlier one."""


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
        is_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        earlier = [signal.signal(number, self._handle) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, earlier, strict=True):
                signal.signal(number, handler)

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


class CalibrationCheckpoint(L.Callback):
    """Saves a measurement's sums at batch boundaries, every so often and before an interruption.

    A checkpoint has kilobytes to megabytes: sums over windows and the indices of these windows,
    never the model.

    Args:
        measurement: The callback that measures; it must stand before this one in the Trainer.
        store: Where its state is kept.
        every_seconds: Seconds between saves.
        stop: Tells whether the run shall end.
    """

    def __init__(
        self,
        measurement: Measurement,
        store: PassStore,
        *,
        every_seconds: float,
        stop: StopRequest,
    ) -> None:
        self._measurement = measurement
        self._store = store
        self._every_seconds = every_seconds
        self._stop = stop
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Save, if it is time or the run shall end."""
        del trainer, pl_module, args
        self._end_batch()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        """Save, if it is time or the run shall end."""
        del trainer, pl_module, args
        self._end_batch()

    def _end_batch(self) -> None:
        is_due = time.monotonic() - self._saved_at >= self._every_seconds
        if is_due or self._stop.signal_number is not None:
            self._store.save(self._measurement.state())
            self._saved_at = time.monotonic()
        self._stop.check()
