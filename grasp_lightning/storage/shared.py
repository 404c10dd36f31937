"""Measurements that runs share, so that each is made once.

An entry is a folder, named by the hash of everything that the measurement depends on. It is
complete from the moment that it appears. A run waits if another one is making the same entry.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from grasp_lightning import processes
from grasp_lightning.errors import ConfigError, GraspError, OutputError, PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type
from grasp_lightning.run_folder.files import as_output_error, sync
from grasp_lightning.storage.results import check_parent

logger = logging.getLogger(__name__)

T = TypeVar("T")
Facts = Mapping[str, Any]
"""What a measurement depends on, as values of JSON."""

_VERSION: Final = 1
_ABOUT: Final = "entry.json"
_POLL_SECONDS: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class _About:
    """The content of entry.json.

    Attributes:
        version: Version of the layout of an entry.
        seconds: How long the measurement took.
        peak_memory_bytes: Of the run until its end; 0 in an entry that does not say.
        facts: What it depends on, to be read by people.
        files: The sha256 of each other file, by name.
    """

    version: int
    seconds: float
    peak_memory_bytes: int = 0
    facts: Facts
    files: Mapping[str, str]


def check_shared_folder(folder: str, output_dir: str, key: str = "statistics.shared") -> None:
    """Refuse a folder, named by a key, that cannot be written or overlaps with the run folder.

    Raises:
        ConfigError: If one of them is inside the other.
    """
    shared, run = (Path(path).expanduser().resolve() for path in (folder, output_dir))
    if shared.is_relative_to(run) or run.is_relative_to(shared):
        raise ConfigError(
            f"{key}: {folder} and output_dir {output_dir} must not be inside each "
            "other; use a folder next to it"
        )
    check_parent(shared / _ABOUT, key)


class SharedFolder:
    """Reads a measurement, or makes it and keeps it for other runs.

    Time and memory of a measurement that is read count as if it had been made; waiting for another
    run does not count, nor does reading or writing.

    Args:
        root: Where the entries are; made on first use.
        facts: What all measurements depend on: the model, and the programs that run it.

    Attributes:
        phases: Times and memory of the run.
    """

    def __init__(self, root: Path, facts: Facts, phases: Phases) -> None:
        self._root = root
        self._facts = facts
        self.phases = phases

    def once(
        self,
        facts: Callable[[], Facts],
        *,
        read: Callable[[Path], T],
        make: Callable[[], T],
        write: Callable[[Path, T], object],
    ) -> T:
        """Return a measurement; all processes of a run must call this.

        An entry that is damaged, or cannot be written, is one line of warning.

        Args:
            facts: What the measurement depends on, in addition to the facts of the folder.
            read: Reads an entry in all processes; a ``GraspError`` says that it is damaged.
            make: Measures.
            write: Writes the files of an entry into a new folder, in rank 0.
        """
        with ExitStack() as held:
            with self.phases.paused():
                complete = processes.on_first(lambda: {**self._facts, **facts()})
                key = hashlib.sha256(json.dumps(complete, sort_keys=True).encode()).hexdigest()
                held.enter_context(locked(self._root / f"{key}.lock"))
                about, found = self._found(self._root / key, read)
            if about is not None:
                self.phases.add(about.seconds, about.peak_memory_bytes)
                return found[0]
            start = self.phases.total
            made = make()
            seconds = self.phases.total - start
            with self.phases.paused():
                processes.on_first(
                    lambda: self._keep(key, complete, seconds, lambda folder: write(folder, made))
                )
            return made

    def _found(self, folder: Path, read: Callable[[Path], T]) -> tuple[_About | None, list[T]]:
        """Return an entry and its content, or nothing."""
        try:
            about = processes.on_first(lambda: _checked(folder))
            return about, [] if about is None else [read(folder)]
        except GraspError as error:
            if processes.is_first():
                logger.warning("%s; it is measured again", error)
            return None, []

    def _keep(
        self, key: str, facts: Facts, seconds: float, write: Callable[[Path], object]
    ) -> None:
        # The name of a folder that a killed process has left, too: only one process has the lock.
        work = self._root / f"{key}.partial"
        try:
            with as_output_error(work):
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                write(work)
                files = {path.name: _sha256(path) for path in sorted(work.iterdir())}
                about = _About(
                    version=_VERSION,
                    seconds=seconds,
                    peak_memory_bytes=self.phases.peak_memory_bytes,
                    facts=facts,
                    files=files,
                )
                text = json.dumps(vars(about), indent=2, sort_keys=True)
                (work / _ABOUT).write_text(text, encoding="utf-8")
                for path in (*work.iterdir(), work):
                    sync(path)
                shutil.rmtree(self._root / key, ignore_errors=True)  # a damaged one
                work.rename(self._root / key)
        except OutputError as error:
            logger.warning("%s; other runs will measure it again", error)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock in rank 0 during a ``with`` block; the system frees it when the process dies.

    All processes of a run must call this. A second run waits, with one warning.
    """
    held: list[int] = []
    is_told = False
    try:
        # It polls, since a collective call may not wait as long as a measurement takes.
        while not processes.on_first(lambda: _take(file, held)):
            if processes.is_first() and not is_told:
                logger.warning("another run is measuring the same for %s; waiting", file.parent)
            is_told = True
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _take(file: Path, held: list[int]) -> bool:
    """Lock a file and note its descriptor, unless another process has locked it."""
    with as_output_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        held.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held.pop())
            return False
    return True


def _checked(folder: Path) -> _About | None:
    """Return what an entry says about itself, or None if there is none.

    Raises:
        PlanError: If it is damaged, or has the layout of another version.
    """
    if not folder.exists():
        return None
    file = folder / _ABOUT
    about = as_type(_About, read_json(file, PlanError), str(file), PlanError)
    if about.version != _VERSION:
        raise PlanError(f"{folder} has version {about.version}, this program writes {_VERSION}")
    for name, expected in about.files.items():
        try:
            is_intact = _sha256(folder / name) == expected
        except OSError as error:
            raise PlanError(f"{folder / name} cannot be read: {error.strerror}") from error
        if not is_intact:
            raise PlanError(f"{folder / name} is damaged: it has changed since it was written")
    return about


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
