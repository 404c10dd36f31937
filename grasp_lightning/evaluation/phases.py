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
        self._start = time.perf_counter()
        self._follow = follow
        self._open: list[tuple[str, tuple[str, ...]]] = []

    @contextmanager
    def __call__(self, name: str, excluding: Iterable[str] = ()) -> Iterator[None]:
        """Add the time of a ``with`` block to a phase, minus that of the phases ``excluding``."""
        inner = tuple(excluding)
        self._open.append((name, inner))
        self._follow(name, inner)
        start, before = time.perf_counter(), self._sum(inner)
        try:
            yield
        finally:
            self._open.pop()
            if self._open:
                self._follow(*self._open[-1])
            elapsed = time.perf_counter() - start - (self._sum(inner) - before)
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def _sum(self, names: tuple[str, ...]) -> float:
        return sum(self.seconds.get(name, 0.0) for name in names)

    @property
    def total(self) -> float:
        """Seconds since this object was created."""
        return time.perf_counter() - self._start


def peak_memory_bytes() -> int:
    """Return the peak resident bytes of this process, or of its CUDA device if it used one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    return lifetime_peak_bytes()
