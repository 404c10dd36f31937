"""Bars on the terminal: one for a whole run, and one for each of its passes.

Inside a ``RunBar``, all bars share one display on standard error, if that is a terminal. Otherwise
each pass has a display of its own.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from grasp_lightning.progress.estimate import Estimate, Stage, Work

T = TypeVar("T")
_WIDTH = 24
_PERCENT = 100
_ALMOST = 99  # percent, while the run is active


class PassBar:
    """The bar of one pass."""

    def __init__(
        self,
        display: Progress,
        task: TaskID,
        total: float | None,
        on_update: Callable[[float], None],
    ) -> None:
        self._display = display
        self._task = task
        self._total = total
        self._on_update = on_update

    def update(self, done: float, note: str = "") -> None:
        """Show how many items are done, and a note, such as the loss."""
        if self._total:
            self._on_update(done / self._total)
        self._display.update(self._task, completed=done, note=note)

    def expect(self, total: float) -> None:
        """Change the number of items."""
        self._total = total
        self._display.update(self._task, total=total, of=f"/{total:.0f}")


class RunBar:
    """Shows a run as one bar: its stage, the share that is done, and the estimated time left.

    Use it as a context manager, and give ``follow`` to ``Phases``: the bar appears at the first
    phase.

    Args:
        stages: The stages, in order.
        is_shown: Whether this process prints to the terminal; otherwise it shows no bar at all.
    """

    def __init__(self, stages: Sequence[Stage], *, is_shown: bool = True) -> None:
        console = Console(stderr=True)
        is_drawn = is_shown and (console.is_terminal or console.is_jupyter)
        self._estimate = Estimate(stages)
        self._is_shown = is_shown
        self._task: TaskID | None = None
        self._percent = 0.0
        self._num_open = 0
        self._display: Progress | None = None  # it draws once when it is created
        if is_drawn:
            self._display = _Display(console, self._refresh)

    def __enter__(self) -> Self:
        _shown.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _shown.remove(self)
        if self._display is None or self._task is None:
            return
        if kind is None:
            self._estimate.finish()
            self._percent = _PERCENT
        self._display.stop()

    def expect_work(self, work: Mapping[str, Work]) -> None:
        """Set the work of stages by phase."""
        self._estimate.expect_work(work)

    def follow(self, phase: str, inner: Sequence[str] = ()) -> None:
        """Show the next stage of a phase, see ``Estimate.follow``."""
        self._estimate.follow(phase, inner)
        if self._display is not None and self._task is None:
            self._task = self._display.add_task("", total=None, of=" %", note="", left=None)
            self._display.start()
        if self._display is not None:
            self._display.refresh()  # a stage may be shorter than the time between two drawings

    def expect_passes(self, number: int) -> None:
        """Set the number of passes of the current stage."""
        self._estimate.expect_passes(number)

    def skip_pass(self) -> None:
        """Count a pass of the current stage that an earlier start has finished."""
        self._estimate.close_pass()

    @contextmanager
    def pass_bar(
        self, description: str, total: float | None, *, done: float, console: Console | None
    ) -> Iterator[PassBar]:
        """Show the bar of a pass; the outermost one shows how much of the stage is done."""
        counts = self._num_open == 0 and bool(total)

        def on_update(share_done: float) -> None:
            if counts:
                self._estimate.advance(share_done)

        self._num_open += 1
        if total:
            on_update(done / total)
        display = self._display or _own_display(console, total, is_shown=self._is_shown)
        try:
            with _row(display, description, total, done, on_update) as bar:
                yield bar
        finally:
            self._num_open -= 1
            if counts:
                self._estimate.close_pass()

    def _refresh(self) -> None:
        if self._display is None or self._task is None:
            return
        left = None
        if self._percent < _PERCENT:
            left, share = self._estimate.seconds_left, self._estimate.share_done
            self._percent = max(self._percent, min(_PERCENT * (share or 0.0), _ALMOST))
        self._display.update(
            self._task,
            description=self._estimate.label,
            completed=self._percent,
            total=_PERCENT if self._percent else None,
            left=left,
        )


_shown: list[RunBar] = []
"""Bars of runs, the innermost last. There is one terminal, so passes find the bar here."""


def pass_bar(
    description: str, total: float | None, *, done: float = 0, console: Console | None = None
) -> AbstractContextManager[PassBar]:
    """Show a bar while a pass runs: below the bar of the run, or alone if there is none.

    Args:
        description: What the pass does.
        total: Number of its items; None if unknown.
        done: Number of items that an earlier start has finished.
        console: Where a bar that is alone is drawn; None is standard output.
    """
    if _shown:
        return _shown[-1].pass_bar(description, total, done=done, console=console)
    return _row(_own_display(console, total), description, total, done, lambda _: None)


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    console: Console | None = None,
) -> Iterator[T]:
    """Yield items, with a ``pass_bar`` that counts them; ``total`` is needed without a length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with pass_bar(description, total, console=console) as bar:
        for number, item in enumerate(items, start=1):
            yield item
            bar.update(number)


def expect_work(work: Mapping[str, Work]) -> None:
    """Give the bar of the run, if any, the work of its stages by phase."""
    if _shown:
        _shown[-1].expect_work(work)


def expect_passes(number: int) -> None:
    """Give the bar of the run, if any, the number of passes of the current stage."""
    if _shown:
        _shown[-1].expect_passes(number)


def skip_pass() -> None:
    """Count the next pass as finished by an earlier start, in the bar of the run, if any."""
    if _shown:
        _shown[-1].skip_pass()


@contextmanager
def _row(
    display: Progress,
    description: str,
    total: float | None,
    done: float,
    on_update: Callable[[float], None],
) -> Iterator[PassBar]:
    """Show a bar as a row of a display, which is started and stopped if it has no other rows."""
    is_shared = bool(display.tasks)
    of = "" if total is None else f"/{total:.0f}"
    task = display.add_task(description, total=total, completed=int(done), of=of, note="")
    with nullcontext() if is_shared else display:
        try:
            yield PassBar(display, task, total, on_update)
        finally:
            if is_shared:
                display.refresh()  # the end of a short pass, too
                display.remove_task(task)


def _own_display(
    console: Console | None, total: float | None, *, is_shown: bool = True
) -> Progress:
    console = console or Console()
    # A pass without a length has nothing to say in a log.
    is_empty = total is None and not console.is_terminal
    return Progress(*_columns(), console=console, disable=is_empty or not is_shown)


class _Display(Progress):
    """Rows of a run and its passes; ``before`` is called ahead of each drawing."""

    def __init__(self, console: Console, before: Callable[[], None]) -> None:
        self._before = before
        # A redirected standard output stays redirected.
        super().__init__(*_columns(), console=console, redirect_stdout=sys.stdout.isatty())

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the table of all rows."""
        self._before()
        yield from super().get_renderables()


class _Amount(ProgressColumn):
    """Items done, as ``3/12`` or ``25 %``."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}{task.fields['of']}")


class _Left(ProgressColumn):
    """Time left, if it can be estimated."""

    def render(self, task: Task) -> Text:
        seconds = task.fields.get("left", task.time_remaining)
        if seconds is None or task.finished:
            return Text("")
        return Text(f"{timedelta(seconds=round(seconds))} left")


def _columns() -> Sequence[ProgressColumn]:
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(_WIDTH),
        _Amount(),
        TimeElapsedColumn(),
        _Left(),
        TextColumn("{task.fields[note]}", markup=False),
    )
