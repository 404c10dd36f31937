"""A job that SLURM warns saves, is requeued once, and is not cut off by later signals."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
from safetensors.torch import load_file

from grasp_lightning.callbacks.requeue import requeue_job
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.callbacks.training_checkpoint import TrainingCheckpoint
from grasp_lightning.cli import main
from grasp_lightning.errors import Interrupted
from tests.conftest import save_tiny
from tests.integration.forked import Outcome, run_ranks
from tests.integration.killing import Kill

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
# Like SLURM, it ends every process of the job, itself included, once the job is requeued.
SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
[ -z "$REFUSAL" ] || { echo "$REFUSAL" >&2; exit 1; }
kill -TERM $PPID $$
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (INT, TERM, USR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def enter_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in job 17, outside of a step that srun has started."""
    for key in [key for key in os.environ if key.startswith("SLURM")] + ["RANK"]:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_job(monkeypatch)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what scontrol was called with, one call per line."""
    enter_job(monkeypatch)
    programs, file = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    file.touch()
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(file))
    return file


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def end_of(work: Callable[[StopRequest], object], *, in_flight: bool = True) -> int | None:
    """Return the signal that ended some work, None if none did."""
    stop = StopRequest()
    try:
        with stop.installed(), stop.deferred() if in_flight else nullcontext():
            work(stop)
    except Interrupted as interrupted:
        return interrupted.signal_number
    return None


def test_outside_of_a_job_the_signal_is_not_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(USR1)
    with StopRequest().installed():
        assert signal.getsignal(USR1) is before
        assert signal.getsignal(TERM) is not signal.SIG_DFL


@pytest.mark.usefixtures("job")
def test_where_nothing_is_in_flight_the_run_ends_at_once() -> None:
    def work(_: StopRequest) -> None:
        send(USR1)
        pytest.fail("it continued")

    assert end_of(work, in_flight=False) == USR1


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    ("numbers", "counts"),
    [
        ((USR1,), USR1),
        ((USR1, USR1), USR1),
        ((TERM, TERM, TERM), TERM),
        ((USR1, TERM, TERM), TERM),  # cancelled while it saved: it must not come back
        ((TERM, USR1), TERM),
        ((USR1, INT), INT),
    ],
)
def test_no_later_signal_cuts_the_batch(numbers: tuple[int, ...], counts: int) -> None:
    def work(stop: StopRequest) -> None:
        send(*numbers)
        assert stop.signal_number == counts

    assert end_of(work) == counts


@pytest.mark.usefixtures("job")
def test_a_second_ctrl_c_does_not_wait() -> None:
    def work(stop: StopRequest) -> None:
        send(INT)
        assert stop.signal_number == INT
        send(INT)
        pytest.fail("it continued")

    assert end_of(work) == INT


@pytest.mark.usefixtures("job")
def test_from_the_warning_to_the_queue_no_signal_ends_the_process() -> None:
    assert end_of(lambda _: send(USR1)) == USR1
    send(TERM, USR1, TERM)


def test_after_another_signal_the_handlers_are_as_before() -> None:
    before = signal.getsignal(TERM)
    assert end_of(lambda _: send(TERM)) == TERM
    assert signal.getsignal(TERM) is before


@pytest.mark.usefixtures("job")
def test_a_warning_takes_the_signals_back_from_a_trainer() -> None:
    def work(_: StopRequest) -> None:
        signal.signal(TERM, lambda *_: pytest.fail("the Trainer's handler was called"))
        send(USR1, TERM)

    assert end_of(work) == TERM


@pytest.mark.usefixtures("job")
def test_the_end_of_another_rank_is_not_an_error_after_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(_: StopRequest) -> None:
        send(*numbers)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("grasp_lightning.processes.num_processes", lambda: 2)
    numbers = [USR1]
    assert end_of(work) == USR1
    numbers = []
    with pytest.raises(RuntimeError, match="closed"):
        end_of(work)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    ("own", "other", "counts"),
    [(USR1, INT, INT), (INT, USR1, INT), (None, TERM, TERM), (USR1, None, USR1)],
)
def test_a_training_of_several_processes_is_not_put_back_after_another_signal(
    own: int | None, other: int | None, counts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "grasp_lightning.processes.gather",
        lambda value: [value, value if isinstance(value, bool) else other],
    )
    saved: list[object] = []
    stop = StopRequest()
    stop.signal_number = own
    checkpoint = TrainingCheckpoint(saved.append, every_seconds=1000, stop=stop)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(Interrupted) as caught:
        checkpoint.on_validation_end(trainer, L.LightningModule())
    assert caught.value.signal_number == counts
    assert len(saved) == 1


@pytest.mark.parametrize(
    ("variables", "called"),
    [
        ({}, "requeue 17\n"),
        ({"SLURM_PROCID": "0"}, "requeue 17\n"),
        ({"SLURM_PROCID": "1"}, ""),
        # Processes that a program of one task has started.
        ({"SLURM_PROCID": "0", "RANK": "1"}, ""),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}, "requeue 12_5\n"),
    ],
)
def test_rank_0_puts_its_job_back_and_the_sigterm_that_follows_ends_nobody(
    variables: dict[str, str], called: str, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert requeue_job() is None
    assert calls.read_text() == called


def test_a_refusal_is_one_line(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSAL", "Requested operation is\npresently disabled")
    expected = "scontrol requeue 17: Requested operation is presently disabled"
    assert requeue_job() == expected
    assert calls.read_text() == "requeue 17\n"


@pytest.mark.usefixtures("job")
def test_a_missing_scontrol_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue_job() == "scontrol requeue 17: No such file or directory"


MODULE = ("grasp_lightning.training.calibration", "CalibrationModule")
IN_A_BATCH = Kill(*MODULE, "training_step", 2)
LOADING = Kill("grasp_lightning.commands.inputs", "", "load_model", 1)
EVALUATING = Kill("grasp_lightning.commands.compress", "", "tracked_perplexity", 1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        "compress",
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--method.name=grasp",
        "--method.num_layers=1",
        "--method.keep_ratio=0.3",
        "--calibration.source=pydoc",
        "--calibration.num_samples=7",
        "--calibration.seqlen=32",
        "--calibration.batch_size=2",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
        "--trainer.checkpoint_seconds=1000",
    ]


def warned(where: Kill, argv: list[str]) -> Outcome:
    """Run the program in a process that sends itself the signal at one place."""
    return run_ranks(argv, 1, where, USR1)


def windows_in(run: Path) -> list[int]:
    (file,) = (run / "checkpoints").glob("pass-*.safetensors")
    windows: list[int] = load_file(file)["windows"].tolist()
    return windows


@pytest.mark.slow
def test_a_warned_run_saves_requeues_and_resumes_to_the_same_plan(
    calls: Path, settings: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = warned(IN_A_BATCH, [*settings, f"--output_dir={folder}"])
    assert done.codes == [0], done.text
    assert "job 17 was requeued" in done.text
    assert calls.read_text() == "requeue 17\n"
    assert windows_in(folder) == [0, 1, 2, 3]
    for run in (folder, tmp_path / "whole"):
        assert main([*settings, f"--output_dir={run}"]) == 0
    assert (folder / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("where", [LOADING, EVALUATING], ids=lambda where: where.name)
def test_a_run_that_is_warned_before_its_first_batch_requeues_at_once(
    where: Kill, calls: Path, settings: list[str], tmp_path: Path
) -> None:
    done = warned(where, [*settings, f"--output_dir={tmp_path / 'run'}"])
    assert done.codes == [0], done.text
    assert calls.read_text() == "requeue 17\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_slurm_does_not_take_back_says_so(
    calls: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSAL", "Requested operation is presently disabled")
    done = warned(IN_A_BATCH, [*settings, f"--output_dir={tmp_path / 'run'}"])
    assert done.codes == [128 + USR1]
    assert calls.read_text() == "requeue 17\n"
    last = done.text.strip().splitlines()[-1]
    assert last.startswith(
        "error: interrupted, and the job could not be requeued (scontrol requeue 17: Requested "
        "operation is presently disabled); run the same command again"
    )
    assert windows_in(tmp_path / "run") == [0, 1, 2, 3]
