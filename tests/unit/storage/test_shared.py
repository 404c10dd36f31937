"""Runs share a measurement: one makes it, the others wait for it and read it."""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from grasp_lightning.errors import ConfigError, OutputError, PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.storage.shared import SharedFolder, check_shared_folder

_FORK = multiprocessing.get_context("fork")
MODEL = {"model": "x"}


def read(folder: Path) -> str:
    return (folder / "value.txt").read_text()


def write(folder: Path, value: str) -> None:
    (folder / "value.txt").write_text(value)


def share(
    root: Path, make: Callable[[], str], phases: Phases | None = None, **facts: object
) -> str:
    folder = SharedFolder(root, MODEL, phases or Phases())
    return folder.once(lambda: facts, read=read, make=make, write=write)


def never() -> str:
    pytest.fail("it was measured again")


def entry(root: Path) -> Path:
    (found,) = (path for path in root.iterdir() if path.is_dir())
    return found


def test_each_measurement_is_made_once(tmp_path: Path) -> None:
    assert share(tmp_path, lambda: "a", layer=1) == "a"
    assert share(tmp_path, never, layer=1) == "a"
    assert share(tmp_path, lambda: "b", layer=2) == "b"
    other_model = SharedFolder(tmp_path, {"model": "y"}, Phases())
    assert other_model.once(lambda: {"layer": 1}, read=read, make=str, write=write) == ""
    assert not list(tmp_path.glob("*.partial"))


def test_the_time_of_a_measurement_counts_in_every_run(tmp_path: Path) -> None:
    def slowly() -> str:
        time.sleep(0.3)
        return "a"

    for make in (slowly, never):
        phases = Phases()
        with phases("outer", excluding=["inner"]), phases("inner"):
            share(tmp_path, make, phases)
        assert phases.seconds["inner"] == pytest.approx(0.3, abs=0.1)
        assert phases.seconds["outer"] == pytest.approx(0, abs=0.1)
        assert phases.total == pytest.approx(0.3, abs=0.1)


def change_version(folder: Path) -> None:
    content = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps({**content, "version": 0}))


def test_the_peak_of_a_measurement_counts_in_every_run(tmp_path: Path) -> None:
    measuring = Phases()
    measuring.add(0, 2**60)
    share(tmp_path, lambda: "a", measuring)
    reading = Phases()
    share(tmp_path, never, reading)
    assert reading.peak_memory_bytes == 2**60
    assert 0 < Phases().peak_memory_bytes < 2**60


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: write(folder, "A"),
        lambda folder: (folder / "value.txt").unlink(),
        lambda folder: (folder / "entry.json").unlink(),
        lambda folder: (folder / "entry.json").write_text("{}"),
        lambda folder: (folder / "entry.json").write_bytes(b""),
        change_version,
    ],
)
def test_a_damaged_entry_is_one_warning_and_made_again(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share(tmp_path, lambda: "a")
    damage(entry(tmp_path))
    assert share(tmp_path, lambda: "a") == "a"
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(str(entry(tmp_path)))
    assert told.endswith("; it is measured again")
    assert share(tmp_path, never) == "a"


def test_an_entry_that_the_reader_refuses_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> str:
        raise PlanError(f"{folder} is damaged")

    share(tmp_path, lambda: "a")
    folder = SharedFolder(tmp_path, MODEL, Phases())
    assert folder.once(dict, read=refuse, make=lambda: "b", write=write) == "b"
    assert len(caplog.records) == 1
    assert share(tmp_path, never) == "b"


def test_an_entry_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path, value: str) -> None:
        write(folder, value)
        raise OutputError(f"{folder} needs 5 MB")

    folder = SharedFolder(tmp_path, MODEL, Phases())
    assert folder.once(dict, read=read, make=lambda: "a", write=fail) == "a"
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("needs 5 MB; other runs will measure it again")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def _measure_slowly(root: Path, has_begun: Event, may_end: Event) -> None:
    def make() -> str:
        has_begun.set()
        may_end.wait(20)
        return "other"

    share(root, make)


@pytest.fixture
def other(tmp_path: Path) -> tuple[multiprocessing.process.BaseProcess, Event]:
    """Another process in the middle of the measurement, and what lets it end."""
    has_begun, may_end = _FORK.Event(), _FORK.Event()
    process = _FORK.Process(target=_measure_slowly, args=(tmp_path, has_begun, may_end))
    process.start()
    assert has_begun.wait(20)
    return process, may_end


def test_a_run_waits_for_another_one_and_reads(
    tmp_path: Path,
    other: tuple[multiprocessing.process.BaseProcess, Event],
    caplog: pytest.LogCaptureFixture,
) -> None:
    process, may_end = other
    caplog.set_level(logging.WARNING)

    def let_end(_: logging.LogRecord) -> bool:
        may_end.set()  # once this one waits
        return True

    caplog.handler.addFilter(let_end)
    phases = Phases()
    assert share(tmp_path, never, phases) == "other"
    process.join(20)
    assert process.exitcode == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"another run is measuring the same for {tmp_path}; waiting"
    ]


def test_a_killed_run_is_not_waited_for(
    tmp_path: Path, other: tuple[multiprocessing.process.BaseProcess, Event]
) -> None:
    process, _ = other
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert share(tmp_path, lambda: "own") == "own"


def test_what_a_killed_run_has_half_written_is_not_read(tmp_path: Path) -> None:
    share(tmp_path, lambda: "a")
    finished = entry(tmp_path)
    partial = finished.with_name(f"{finished.name}.partial")
    finished.rename(partial)
    write(partial, "half")
    assert share(tmp_path, lambda: "a") == "a"
    assert entry(tmp_path) == finished


def test_a_folder_that_overlaps_with_the_run_is_refused(tmp_path: Path) -> None:
    for shared, run in (("runs", "runs/a"), ("runs/a/shared", "runs/a"), ("runs/a", "runs/a")):
        with pytest.raises(ConfigError, match=r"shared: .* must not be inside each"):
            check_shared_folder(str(tmp_path / shared), str(tmp_path / run))
    check_shared_folder(str(tmp_path / "runs/shared"), str(tmp_path / "runs/a"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"statistics.shared: .*file is a file"):
        check_shared_folder(str(tmp_path / "file"), str(tmp_path / "run"))
