"""Several processes, started by the program or torchrun, give the same result as one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv, compressed_folder
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import ROOT, Kill

PROGRAM = [sys.executable, str(ROOT / "cli.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

pytestmark = pytest.mark.slow  # every process imports torch and transformers


def run(
    *words: object, program: list[str] = PROGRAM, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--method.name=grasp",
        "--method.num_layers=2",
        "--method.keep_ratio=0.3",
        "--calibration.source=pydoc",
        "--calibration.num_samples=7",  # odd: one process has a window more
        "--calibration.seqlen=48",
        "--calibration.batch_size=2",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=5",
        "--evaluation.seqlen=48",
        "--trainer.checkpoint_seconds=0",
    ]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, by preset."""
    folders = {}
    for preset in ("paper", "released"):
        folders[preset] = tmp_path_factory.mktemp("alone") / preset
        argv = [*settings, f"--method.preset={preset}", f"--output_dir={folders[preset]}"]
        assert main(["compress", *argv]) == 0
    return folders


def assert_equal_runs(first: Path, second: Path) -> None:
    """Decisions are the same, and scores within 1e-5."""
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    left, right = (load_file(folder / "scores.safetensors") for folder in (first, second))
    assert left.keys() == right.keys()
    for key, values in left.items():
        torch.testing.assert_close(right[key], values, rtol=1e-5, atol=0)
    contents = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    perplexities = [content["perplexity"]["compressed"] for content in contents]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
    assert not (second / "checkpoints").exists()


def test_the_program_starts_its_own_processes(
    settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    done = run("compress", *settings, "--trainer.devices=2", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model:  ") == 1
    assert_equal_runs(alone["paper"], tmp_path / "run")


def assert_success(argv: Sequence[str], number: int) -> None:
    """Run a command in a number of processes; one of them prints the result."""
    done = run_ranks([*argv, f"--trainer.devices={number}"], number)
    assert done.codes == [0] * number, done.text
    assert done.text.count("model:  ") == 1


@pytest.mark.parametrize(("preset", "number"), [("paper", 3), ("released", 2)])
def test_several_processes_decide_as_one_does(
    preset: str, number: int, settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    words = [*settings, f"--method.preset={preset}", f"--output_dir={tmp_path / 'run'}"]
    assert_success(["compress", *words], number)
    assert_equal_runs(alone[preset], tmp_path / "run")


def test_processes_write_the_text_that_one_process_writes(
    settings: list[str], tmp_path: Path
) -> None:
    own = [*settings, "--calibration.source=[pydoc,self]", "--calibration.num_samples=70"]
    assert main(["compress", *own, f"--output_dir={tmp_path / 'alone'}"]) == 0
    assert_success(["compress", *own, f"--output_dir={tmp_path / 'run'}"], 2)
    assert_equal_runs(tmp_path / "alone", tmp_path / "run")
    writing = Kill("grasp_lightning.models.sampling", "", "_continued", 2)
    argv = ["compress", *own, f"--output_dir={tmp_path / 'more'}"]
    assert killed(writing, signal.SIGKILL, argv) == -signal.SIGKILL
    assert_success(argv, 2)
    assert_equal_runs(tmp_path / "alone", tmp_path / "more")


def test_torchrun_starts_them_too(
    settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    words = ["compress", *settings, "--trainer.devices=2", f"--output_dir={tmp_path / 'run'}"]
    done = run(ROOT / "cli.py", *words, program=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model:  ") == 1
    assert_equal_runs(alone["paper"], tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "call", "number"),
    [("predict_step", 1, 2), ("training_step", 1, 1), ("training_step", 2, 3)],
)
def test_killed_processes_go_on_as_another_number_of_them(  # noqa: PLR0917  parameters of pytest
    place: str,
    call: int,
    number: int,
    settings: list[str],
    alone: dict[str, Path],
    tmp_path: Path,
) -> None:
    where = Kill("grasp_lightning.training.calibration", "CalibrationModule", place, call + 1)
    words = [*settings, "--calibration.batch_size=1", f"--output_dir={tmp_path / 'run'}"]
    # Both kill themselves in this call: the earlier checkpoints of both exist.
    both = ["compress", *words, "--trainer.devices=2"]
    assert run_ranks(both, 2, where).codes == [-signal.SIGKILL] * 2
    saved = list((tmp_path / "run" / "checkpoints").glob("pass-*"))
    windows = [set(load_file(file)["windows"].tolist()) for file in saved]
    assert windows
    assert sum(map(len, windows)) == len(set().union(*windows))  # each one once
    assert_success(["compress", *words], number)
    assert_equal_runs(alone["paper"], tmp_path / "run")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = compressed_folder(tmp_path_factory.mktemp("compressed"))
    return [
        *compensate_argv(model, tmp_path_factory.mktemp("samples")),
        "--lora.rank=4",
        "--lora.dropout=0",
        # 25 samples, so that the last step of an epoch has fewer rows than there are processes.
        "--data.num_validation=5",
        "--training.batch_size=4",
        "--training.micro_batch_size=1",
        "--training.epochs=2",
        "--training.validate_every=3",
        "--training.keep=best",
        "--trainer.checkpoint_seconds=0",
    ]


def history(folder: Path) -> dict[str, list[float]]:
    content: dict[str, list[float]] = json.loads((folder / "metrics.json").read_text())["history"]
    return content


@pytest.fixture(scope="module")
def trained_together(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "run"
    assert_success(["compensate", *training, f"--output_dir={folder}"], 2)
    return folder


def test_two_processes_train_as_one_does(
    training: list[str], trained_together: Path, tmp_path: Path
) -> None:
    assert main(["compensate", *training, f"--output_dir={tmp_path / 'run'}"]) == 0
    alone, together = history(tmp_path / "run"), history(trained_together)
    assert len(alone["loss"]) == 14
    for key in ("loss", "validation_loss", "learning_rate"):
        assert together[key] == pytest.approx(alone[key], rel=1e-5)
    contents = [
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "run", trained_together)
    ]
    for content in contents:
        for key in ("seconds", "peak_memory_bytes", "tokens_per_second", "history"):
            del content[key]
        content["perplexity"] = [round(value, 3) for value in content["perplexity"].values()]
        content["validation_loss"] = [round(x, 5) for x in content["validation_loss"].values()]
    assert contents[0] == contents[1]
    left, right = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (tmp_path / "run", trained_together)
    )
    for key, values in left.items():
        torch.testing.assert_close(right[key], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("call", [2, 6])
def test_killed_trainings_of_two_processes_go_on_to_the_same_weights(
    call: int, training: list[str], trained_together: Path, tmp_path: Path
) -> None:
    module = "grasp_lightning.training.compensation.module"
    where = Kill(module, "CompensationModule", "training_step", call)
    argv = ["compensate", *training, f"--output_dir={tmp_path / 'run'}"]
    assert run_ranks([*argv, "--trainer.devices=2"], 2, where).codes == [-signal.SIGKILL] * 2
    assert_success(argv, 2)
    assert history(tmp_path / "run") == history(trained_together)
    left, right = (
        load_file(folder / "model" / "model.safetensors")
        for folder in (tmp_path / "run", trained_together)
    )
    assert all(torch.equal(left[key], right[key]) for key in left)


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, pattern: str) -> None:
    end = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()]


MANY = ("--calibration.num_samples=120", "--calibration.batch_size=1")


@pytest.fixture(scope="module")
def long_alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "run"
    assert main(["compress", *settings, *MANY, f"--output_dir={folder}"]) == 0
    return folder


def test_a_process_that_dies_ends_the_others_and_is_named(
    settings: list[str], long_alone: Path, tmp_path: Path
) -> None:
    words = [*settings, *MANY, "--trainer.devices=2", f"--output_dir={tmp_path / 'run'}"]
    program = start("compress", *words)
    wait_for(tmp_path / "run" / "checkpoints", "pass-0-1.safetensors")
    first, second = sorted(children_of(program.pid))
    os.kill(second, signal.SIGKILL)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: process 1 of 2 was ended by SIGKILL")
    assert "run the same command again" in last
    assert not Path(f"/proc/{first}").exists()
    assert_success(["compress", *words], 2)
    assert_equal_runs(long_alone, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_signal_lets_all_processes_save(
    number: int, settings: list[str], long_alone: Path, tmp_path: Path
) -> None:
    words = [*settings, *MANY, "--trainer.devices=2", f"--output_dir={tmp_path / 'run'}"]
    program = start("compress", *words)
    wait_for(tmp_path / "run" / "checkpoints", "pass-0-1.safetensors")
    program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 128 + number
    assert re.search(r"^error: interrupted; run the same command again", errors, re.MULTILINE)
    assert_success(["compress", *words], 2)
    assert_equal_runs(long_alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--calibration.num_samples=1"],
            "calibration.num_samples is 1, fewer than the 2 processes",
        ),
        (["--trainer.num_nodes=2"], "trainer.num_nodes is 2: start the command on every node"),
        (["--trainer.strategy=tp"], "trainer.strategy: expected one of auto, ddp, fsdp"),
        (
            ["--trainer.strategy=deepspeed_stage_2"],
            "trainer.strategy is deepspeed_stage_2, which calibration does not support",
        ),
        (["--model.path=/nowhere/at/all"], "model.path: no such file or folder"),
    ],
)
def test_bad_input_is_one_line_of_one_process(
    options: list[str], message: str, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, "--trainer.devices=2", *options, f"--output_dir={tmp_path / 'run'}"]
    done = run_ranks(["compress", *words], 1)
    assert done.codes == [2]
    errors = [line for line in done.text.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()


def test_processes_that_were_started_must_be_as_many_as_the_configuration_says(
    settings: list[str], tmp_path: Path
) -> None:
    done = run_ranks(["compress", *settings, f"--output_dir={tmp_path / 'run'}"], 2)
    assert done.codes == [2, 2]
    assert "trainer.devices times trainer.num_nodes is 1, but there are 2 processes" in done.text
