"""Runs what is missing of a grid: models first, then what is measured on them, then their speed."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grasp_lightning.comparison.folder import GridFolder
from grasp_lightning.comparison.grid import Cell, is_asked
from grasp_lightning.comparison.measurements import Keyed, Measurements, key_of
from grasp_lightning.comparison.pool import Job, Lane, Outcome, run_lanes
from grasp_lightning.comparison.worker import (
    Convert,
    Measure,
    MeasureSpeed,
    check_measurable,
    write_request,
)
from grasp_lightning.errors import GraspError, ModelError
from grasp_lightning.reading.text import one_line

Tell = Callable[[str], None]
_PROGRAM, _WORKER = "grasp_lightning", "grasp_lightning.comparison.worker"
_LOCK_SECONDS = 60.0  # of a process whose compare was killed, and which still saves
_Steps = Generator[Job | None, Outcome | None, bool]


@dataclass
class GridRun:
    """Runs cells; finished parts are only looked up.

    Attributes:
        tell: Shows a line to the user.
        failures: Why cells failed, on one line each.
    """

    folder: GridFolder
    tell: Tell
    failures: dict[Cell, str] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run what is missing of some cells; one that fails is noted, and the others continue.

        A text or a task that cannot be measured at all is a ``GraspError``.
        """
        config = self.folder.config
        missing = [cell for cell in cells if self._is_missing(cell)]
        self.tell(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished")
        if not missing:
            return
        self._prepare(missing)
        threads = None if config.jobs == 1 else max(_num_threads() // config.jobs, 1)
        bases = list(dict.fromkeys(cell.base for cell in missing))
        lanes = [self._lane(base, [c for c in missing if c.base == base]) for base in bases]
        run_lanes(lanes, config.jobs, threads)
        # One at a time, and nothing else at the same time: it would be measured, too.
        run_lanes([self._speed_lane(cell) for cell in missing if self._lacks_speed(cell)], 1)

    def _is_missing(self, cell: Cell) -> bool:
        is_made = cell.is_dense or self.folder.state(cell) == "finished"
        return not is_made or self._lacks_any(cell) or self._lacks_speed(cell)

    def _lacks_any(self, cell: Cell) -> bool:
        measure = self._measure(cell)
        return bool(measure.text_keys or measure.task_keys) or self._lacks_cost(cell)

    def _lacks_cost(self, cell: Cell) -> bool:
        return _is_other(Measurements.read(self.folder.measurements(cell)).cost, self._key(cell))

    def _lacks_speed(self, cell: Cell) -> bool:
        speed = self.folder.config.speed
        if cell.is_dense or cell in self.failures or not is_asked(speed, cell):
            return False
        if speed.prefill_length is None and speed.decode_batch_size is None:
            return False
        stored = Measurements.read(self.folder.measurements(cell)).speed
        return _is_other(stored, self._speed_key(cell))

    def _key(self, cell: Cell) -> str:
        return self.folder.key(cell)

    def _speed_key(self, cell: Cell) -> str:
        speed = replace(self.folder.config.speed, removed_ratios=None)
        return key_of(self._key(cell), self._key(Cell(model=cell.model)), speed)

    def _measure(self, cell: Cell) -> Measure:
        """Return the request to measure what is missing."""
        config, key = self.folder.config, self._key(cell)
        done = Measurements.read(self.folder.measurements(cell))
        # Without a key, as in the files of earlier versions, products are not rounded.
        rounding = () if config.matmul_precision == "highest" else (config.matmul_precision,)
        texts = {name: key_of(key, text, *rounding) for name, text in config.texts.items()}
        tasks = {}
        if is_asked(config.tasks, cell):
            settings = replace(config.tasks, names=(), removed_ratios=None)
            task_key = key_of(key, settings, _lm_eval_version(), *rounding)
            tasks = dict.fromkeys(config.tasks.names, task_key)
        return Measure(
            model=self.folder.model(cell),
            file=str(self.folder.measurements(cell)),
            key=key,
            texts=config.texts,
            text_keys={n: k for n, k in texts.items() if _is_other(done.texts.get(n), k)},
            tasks=config.tasks,
            task_keys={n: k for n, k in tasks.items() if _is_other(done.tasks.get(n), k)},
            matmul_precision=config.matmul_precision,
        )

    def _prepare(self, missing: Sequence[Cell]) -> None:
        """Convert models that load slowly, and refuse what no cell could measure."""
        config = self.folder.config
        names = list(dict.fromkeys(cell.model for cell in missing))
        failed: list[str] = []
        for name in names:
            copy, source = self.folder.models[name], config.models[name]
            if copy != source and not Path(copy.path).expanduser().is_dir():
                self.tell(f"{name}: converting {source.path} to {copy.path}, once")
                run_lanes([self._convert(name, failed)], 1)
        if failed:
            raise ModelError(failed[0])
        models = [self.folder.models[name] for name in names]
        check_measurable(models, config.texts, config.tasks)

    def _convert(self, name: str, failed: list[str]) -> Lane:
        model, folder = self.folder.config.models[name], self.folder.models[name].path
        request = Convert(model=model, folder=folder)
        outcome = yield self._job("convert", Cell(model=name), request)
        if outcome is not None and outcome.error is not None:
            failed.append(outcome.error)

    def _job(self, work: str, cell: Cell, request: object) -> Job:
        file = self.folder.root / "requests" / f"{cell.name}-{work}.json"
        write_request(request, file)
        return Job(module=_WORKER, words=[work, str(file)], log=self.folder.log(cell))

    def _lane(self, base: Cell, cells: Sequence[Cell]) -> Lane:
        """Make and measure a model, then the models that are trained from it."""
        yield from self._guarded(base)
        for cell in cells:
            if cell == base:
                continue
            start = cell.start
            if start in self.failures and self.folder.state(start) != "finished":
                self._fail(cell, f"{start.name} failed: {self.failures[start]}")
            else:
                yield from self._guarded(cell)

    def _guarded(self, cell: Cell) -> Lane:
        """Make and measure one cell; files that cannot be read or written are its failure."""
        try:
            if (yield from self._made(cell)):
                yield from self._measured(cell)
        except GraspError as error:
            self._fail(cell, one_line(error))

    def _made(self, cell: Cell) -> _Steps:
        """Compress or train; return whether the model is there."""
        if cell.is_dense:
            return True
        yield from self._unlocked(cell)
        state = self.folder.state(cell)
        if state != "finished":
            command = "compensate" if cell.is_trained else "compress"
            file = self.folder.write_settings(cell)
            words = [command, f"--config={file}", *(["--overwrite"] if state == "changed" else [])]
            job = Job(module=_PROGRAM, words=words, log=self.folder.log(cell))
            outcome = yield job
            assert outcome is not None  # the lane yielded a job
            self._note(cell, command, outcome)
            if outcome.error is not None:
                self._fail(cell, outcome.error)
                return False
            verb = "trained" if cell.is_trained else "compressed"
            self.tell(f"{cell.name}: {verb} in {outcome.seconds:.0f} s")
        self._write(cell, lambda done: replace(done, made=self._key(cell)))
        return True

    def _unlocked(self, cell: Cell) -> Generator[None, Outcome | None, None]:
        """Wait while the process of a killed compare still saves its work."""
        end = time.monotonic() + _LOCK_SECONDS
        while self.folder.is_in_use(cell) and time.monotonic() < end:
            yield None

    def _measured(self, cell: Cell) -> Generator[Job | None, Outcome | None, None]:
        if not self._lacks_any(cell):
            return
        outcome = yield self._job("measure", cell, self._measure(cell))
        assert outcome is not None  # the lane yielded a job
        self._note(cell, "measure", outcome)
        if outcome.error is not None:
            self._fail(cell, outcome.error)
            return
        texts = Measurements.read(self.folder.measurements(cell)).texts
        shown = [f"{name} {texts[name].result.perplexity:.2f}" for name in self.folder.config.texts]
        self.tell(f"{cell.name}: {', '.join(shown)}, measured in {outcome.seconds:.0f} s")

    def _speed_lane(self, cell: Cell) -> Lane:
        request = MeasureSpeed(
            dense=self.folder.models[cell.model],
            model=self.folder.model(cell),
            file=str(self.folder.measurements(cell)),
            key=self._speed_key(cell),
            speed=self.folder.config.speed,
        )
        outcome = yield self._job("speed", cell, request)
        assert outcome is not None  # the lane yielded a job
        self._note(cell, "speed", outcome)
        if outcome.error is not None:
            self._fail(cell, outcome.error)
            return
        self.tell(f"{cell.name}: throughput measured in {outcome.seconds:.0f} s")

    def _note(self, cell: Cell, what: str, outcome: Outcome) -> None:
        self._write(cell, lambda done: done.with_seconds(what, outcome.seconds))

    def _write(self, cell: Cell, change: Callable[[Measurements], Measurements]) -> None:
        file = self.folder.measurements(cell)
        before = Measurements.read(file)
        after = change(before)
        if after != before:
            after.write(file)

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failures[cell] = reason
        self.tell(f"{cell.name}: failed: {reason}")


def _is_other(stored: Keyed[Any] | None, key: str) -> bool:  # Any: whatever was measured
    return stored is None or stored.key != key


def _lm_eval_version() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError:  # the check of the tasks says so
        return ""


def _num_threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else os.cpu_count() or 1
