import signal
import threading
import time
from os import getpid, kill
from pathlib import Path

import pytest

from grasp_lightning.comparison.pool import Job, Lane, Outcome, run_lanes
from grasp_lightning.errors import Interrupted

PROGRAMS = {
    "works": "print('fine')",
    "refuses": "import sys; print('error: no such layer', file=sys.stderr); sys.exit(2)",
    "breaks": "raise KeyError('bug')",
    "dies": "import os; os.kill(os.getpid(), 9)",
    "sleeps": "import time; open('slept', 'w').close(); time.sleep(60)",
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PROGRAMS.items():
        (tmp_path / f"{name}_program.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(folder: Path, name: str) -> Job:
    return Job(module=f"{name}_program", words=[], log=folder / "logs" / f"{name}.log")


def lane(outcomes: list[Outcome | None], *jobs: Job) -> Lane:
    for one in jobs:
        outcome = yield one
        outcomes.append(outcome)


def test_a_failure_is_one_line_and_the_others_go_on(programs: Path) -> None:
    found: dict[str, list[Outcome | None]] = {name: [] for name in PROGRAMS if name != "sleeps"}
    run_lanes([lane(out, job(programs, name)) for name, out in found.items()], 2)
    errors = {name: out[0].error for name, out in found.items() if out[0] is not None}
    assert errors == {
        "works": None,
        "refuses": "no such layer",
        "breaks": "its process ended with code 1: KeyError: 'bug'",
        "dies": "its process was ended by SIGKILL, probably because memory ran out",
    }
    assert (programs / "logs" / "works.log").read_text() == "fine\n"


def test_an_earlier_failure_in_the_log_is_not_repeated(programs: Path) -> None:
    log, found = programs / "both.log", list[Outcome | None]()
    jobs = [Job(module=f"{name}_program", words=[], log=log) for name in ("refuses", "breaks")]
    run_lanes([lane(found, *jobs)], 1)
    assert [None if out is None else out.error for out in found] == [
        "no such layer",
        "its process ended with code 1: KeyError: 'bug'",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes(number: int, programs: Path) -> None:
    def send() -> None:
        while not (programs / "slept").exists():
            time.sleep(0.05)
        kill(getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    start = time.monotonic()
    with pytest.raises((KeyboardInterrupt, Interrupted)) as raised:
        run_lanes([lane([], job(programs, "sleeps"))], 1)
    sender.join()
    assert time.monotonic() - start < 20
    assert isinstance(raised.value, Interrupted) == (number == signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
