"""Estimate of the time that a run still takes, from the speed of its stages so far."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_ENOUGH = 0.02  # share of a stage that must be done before its speed is known


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
        phase: Its phase in ``Phases``; several stages may share one.
        label: What the stage does, in words.
        passes: Expected number of passes over its items.
        like: Phase that takes about as long, for a stage whose work is not known.
    """

    phase: str
    label: str
    passes: int = 1
    like: str | None = None


class Work(NamedTuple):
    """Expected work of a stage, in a unit that all stages share, and its number of passes."""

    amount: float
    passes: int | None = None


class _Timed:
    """A stage, and what was measured of it.

    Attributes:
        work: Expected work; 0 if unknown.
        passes: Expected number of passes.
        share: Share of its work that is done, earlier starts included.
        seconds: Its duration when ``share`` was last set.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.work = 0.0
        self.passes = stage.passes
        self.share = 0.0
        self.seconds = 0.0
        self._closed = 0
        self._earlier: float | None = None

    def advance(self, share_of_pass: float, seconds: float) -> None:
        """Note how much of the current pass is done."""
        passes = max(self.passes, self._closed + 1)
        self.share, self.seconds = (self._closed + share_of_pass) / passes, seconds
        if self._earlier is None:
            self._earlier = self.share

    def close_pass(self) -> None:
        """Count a pass as complete."""
        self._closed += 1

    def end(self, seconds: float) -> None:
        """Note the end of the stage."""
        self.share, self.seconds = 1.0, seconds

    @property
    def own_share(self) -> float:
        """Share done since this start; 0 if it is too small to show a speed."""
        own = 0.0 if self._earlier is None else self.share - self._earlier
        return own if own >= _ENOUGH else 0.0


class Estimate:
    """Follows the stages of a run, and estimates the time left.

    The speed of finished stages gives the time of later ones; the passes of the current stage give
    its own. There is no estimate before a speed is known.

    Args:
        stages: The stages, in order.
        clock: Returns seconds.
    """

    def __init__(
        self, stages: Sequence[Stage], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._stages = [_Timed(stage) for stage in stages]
        self._current = 0
        self._since = clock()

    @property
    def label(self) -> str:
        """The current stage with its number, such as ``[3/9] measure curvature``."""
        return f"[{self._current + 1}/{len(self._stages)}] {self._now.stage.label}"

    def expect_work(self, work: Mapping[str, Work]) -> None:
        """Set the work of stages by phase."""
        for timed in self._stages:
            if timed.stage.phase in work:
                amount, passes = work[timed.stage.phase]
                timed.work, timed.passes = amount, passes or timed.passes

    def follow(self, phase: str, inner: Sequence[str] = ()) -> None:
        """Move on to the next stage of a phase, but not past one that belongs to ``inner``.

        It never moves back, and skips stages that an earlier start has finished.
        """
        if self._now.stage.phase == phase:
            return
        for number, timed in enumerate(self._stages[self._current + 1 :], self._current + 1):
            if timed.stage.phase == phase:
                self._move_to(number)
            if timed.stage.phase in (phase, *inner):
                return

    def finish(self) -> None:
        """Move on to the last stage."""
        self._move_to(len(self._stages) - 1)

    def expect_passes(self, number: int) -> None:
        """Set the number of passes of the current stage."""
        self._now.passes = number

    def advance(self, share_of_pass: float) -> None:
        """Note how much of the current pass is done."""
        self._now.advance(share_of_pass, self._spent)

    def close_pass(self) -> None:
        """Count a pass as complete."""
        self._now.close_pass()

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the run; None before a speed is known."""
        expected = [self._expected(timed) for timed in self._stages[self._current :]]
        known = [seconds for seconds in expected if seconds is not None]
        if len(known) < len(expected) or (self._spent > known[0] and not self._now.own_share):
            return None  # it takes longer than expected
        return sum(known) - min(self._spent, known[0])

    @property
    def share_done(self) -> float | None:
        """Share of the run's time that is over, earlier starts included; None if unknown."""
        left, pace = self.seconds_left, self._pace or 0.0
        if left is None:
            return None
        own = self._now.own_share
        spent = self._spent * self._now.share / own if own else self._spent
        for timed in self._stages[: self._current]:
            spent += timed.seconds or pace * timed.work
        return spent / (spent + left) if spent else 0.0

    @property
    def _now(self) -> _Timed:
        return self._stages[self._current]

    @property
    def _spent(self) -> float:
        """Seconds in the current stage."""
        return self._clock() - self._since

    @property
    def _pace(self) -> float | None:
        """Seconds per unit of work, over all stages whose speed is known."""
        known = [timed for timed in self._stages if timed.work and timed.own_share]
        work = sum(timed.work * timed.own_share for timed in known)
        return sum(timed.seconds for timed in known) / work if work else None

    def _expected(self, timed: _Timed) -> float | None:
        """Return the expected duration of a stage in this start, in seconds; None if unknown."""
        if timed.own_share:
            return timed.seconds * (1 + (1 - timed.share) / timed.own_share)
        if timed.work:
            return None if self._pace is None else self._pace * timed.work
        alike = [other for other in self._stages if other.stage.phase == timed.stage.like]
        return sum(other.seconds for other in alike) or None

    def _move_to(self, number: int) -> None:
        if number != self._current:
            self._now.end(self._spent)
            self._current, self._since = number, self._clock()
