"""Processes of a grid: several at once, ended together with the process that started them."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from grasp_lightning.errors import Interrupted, OutputError
from grasp_lightning.launch import child_environment

_POLL = 0.1  # seconds
_PATIENCE = 30.0  # seconds for a process to save its work
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process to run.

    Attributes:
        module: What Python runs, as after ``-m``.
        words: Its arguments.
        log: File to which its output is added.
    """

    module: str
    words: Sequence[str]
    log: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a process: why it failed, on one line, or None; and its wall-clock seconds."""

    error: str | None
    seconds: float


Lane = Generator[Job | None, Outcome | None, None]
"""Jobs one after the other: yields each, gets its outcome; None waits a moment and gets None."""


@dataclass
class _Running:
    """A lane and its process; None while the lane waits."""

    lane: Lane
    job: Job | None = None
    process: subprocess.Popen[bytes] | None = None
    start: float = 0.0
    log_start: int = 0


@dataclass
class _Stop:
    """Signals that have arrived."""

    numbers: list[int] = field(default_factory=list)


def run_lanes(lanes: Iterable[Lane], width: int, threads: int | None = None) -> None:
    """Run lanes, ``width`` at once, in their order; the next one starts when one has ended.

    SIGINT, SIGTERM and SIGUSR1 end all processes, which first save their work. Then SIGINT raises
    ``KeyboardInterrupt``, the others ``Interrupted``.

    Args:
        threads: CPU threads of each process; None leaves it to torch.
    """
    environment = child_environment()
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    waiting, running = iter(lanes), list[_Running]()
    with _listening() as stop:
        try:
            while True:
                running += _started(waiting, width - len(running))
                if not running:
                    return
                running = [one for one in running if _goes_on(one, environment)]
                time.sleep(_POLL)
                if stop.numbers:
                    _end(running, stop)
                    _raise(stop.numbers[0])
        finally:
            for one in running:
                if one.process is not None:
                    one.process.kill()
                    one.process.wait()


def _started(waiting: Iterator[Lane], number: int) -> list[_Running]:
    found = []
    for _ in range(number):
        lane = next(waiting, None)
        if lane is not None:
            found.append(_Running(lane))
    return found


def _goes_on(one: _Running, environment: Mapping[str, str]) -> bool:
    """Start the next process of a lane if the last one has ended; return False at its end."""
    if one.process is not None and one.process.poll() is None:
        return True
    outcome = None if one.process is None else _outcome(one)
    one.process = None
    try:
        one.job = one.lane.send(outcome)
    except StopIteration:
        return False
    if one.job is not None:
        _start(one, one.job, environment)
    return True


def _start(one: _Running, job: Job, environment: Mapping[str, str]) -> None:
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            one.start, one.log_start = time.monotonic(), log.tell()
            one.process = subprocess.Popen(
                [sys.executable, "-m", job.module, *job.words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C arrives here, and this process passes it on once
            )
    except OSError as error:
        raise OutputError(f"cannot write {job.log}: {error.strerror}") from error


def _outcome(one: _Running) -> Outcome:
    assert one.process is not None  # it has ended
    assert one.job is not None
    code, error = one.process.wait(), None
    if code != 0:
        with one.job.log.open("rb") as log:
            log.seek(one.log_start)
            text = log.read().decode(errors="replace")
        error = _reason(code, text)
    return Outcome(error=error, seconds=time.monotonic() - one.start)


def _reason(code: int, text: str) -> str:
    """Return why a process failed, from its exit code and its output."""
    if code < 0:
        end = f"its process was ended by {signal.Signals(-code).name}"
        return f"{end}, probably because memory ran out" if -code == signal.SIGKILL else end
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")


@contextmanager
def _listening() -> Iterator[_Stop]:
    """Collect signals instead of ending; only the main thread can."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        stop.numbers.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = _SIGNALS if is_main else ()
    earlier = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _end(running: Sequence[_Running], stop: _Stop) -> None:
    """Let all processes save and end; a second signal ends the wait for them."""
    processes = [one.process for one in running if one.process is not None]
    for process in processes:
        process.terminate()
    end = time.monotonic() + _PATIENCE
    while (
        time.monotonic() < end
        and len(stop.numbers) == 1
        and any(process.poll() is None for process in processes)
    ):
        time.sleep(_POLL)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    error = Interrupted(number)
    error.has_saved = True
    raise error
