"""Wall-clock time and peak memory of a run."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from grasp_lightning.evaluation.peak_memory import lifetime_peak_bytes


class Phases:
    """Sums the seconds spent in named phases.

    Args:
        follow: Called with the phase that begins or continues, and the phases inside it.
    """

    def __init__(self, follow: Callable[[str, tuple[str, ...]], object] = lambda *_: None) -> None:
        self.seconds: dict[str, float] = {}
        self._uncounted = 0.0
        self._read_peak = 0
        self._start = self._now()
        self._follow = follow
        self._open: list[tuple[str, tuple[str, ...]]] = []

    @contextmanager
    def __call__(self, name: str, excluding: Iterable[str] = ()) -> Iterator[None]:
        """Add the time of a ``with`` block to a phase, minus that of the phases ``excluding``."""
        inner = tuple(excluding)
        self._open.append((name, inner))
        self._follow(name, inner)
        start, before = self._now(), self._sum(inner)
        try:
            yield
        finally:
            self._open.pop()
            if self._open:
                self._follow(*self._open[-1])
            elapsed = self._now() - start - (self._sum(inner) - before)
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def _sum(self, names: tuple[str, ...]) -> float:
        return sum(self.seconds.get(name, 0.0) for name in names)

    @property
    def total(self) -> float:
        """Seconds since this object was created, without pauses and with added time."""
        return self._now() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time of a ``with`` block neither in a phase nor in the total."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._uncounted += time.perf_counter() - start

    def add(self, seconds: float, peak_memory_bytes: int = 0) -> None:
        """Count an earlier run's time, in the open phases and the total, and its memory."""
        self._uncounted -= seconds
        self._read_peak = max(self._read_peak, peak_memory_bytes)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident bytes of this process, or of its CUDA device, and of added runs."""
        return max(self._read_peak, _peak_bytes())

    def _now(self) -> float:
        return time.perf_counter() - self._uncounted


def _peak_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    return lifetime_peak_bytes()
