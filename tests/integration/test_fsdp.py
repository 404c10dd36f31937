"""Two processes that shard one model by FSDP2 give the same result as one process."""

import filecmp
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.forked import run_ranks
from tests.integration.killing import ROOT, Kill
from tests.integration.sharded_checks import CHECKS
from tests.integration.test_processes import (
    TORCHRUN,
    assert_equal_runs,
    assert_success,
    run,
    start,
    wait_for,
)

pytestmark = pytest.mark.slow  # every process imports torch and transformers

SHARED = ["--trainer.devices=2", "--trainer.strategy=fsdp"]
METHODS = {
    "one_shot": ["--method.name=grasp", "--method.preset=paper", "--method.keep_ratio=0.3"],
    "iterative": ["--method.name=grasp", "--method.preset=released", "--method.keep_ratio=0.3"],
    "drop": ["--method.name=drop"],
    "shortened_llama": ["--method.name=shortened_llama", "--method.criterion=taylor"],
}
# With biases and tied embeddings, and without.
MODELS = {
    "one_shot": "qwen2",
    "iterative": "llama",
    "drop": "llama",
    "shortened_llama": "qwen2",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The command line of each method."""
    folder = tmp_path_factory.mktemp("models")
    paths = {family: save_tiny(folder / family, family) for family in set(MODELS.values())}
    return {
        name: [
            f"--model.path={paths[MODELS[name]]}",
            *words,
            "--method.num_layers=2",
            "--calibration.source=pydoc",
            "--calibration.num_samples=5",  # odd: one process has a window more
            "--calibration.seqlen=48",
            "--calibration.batch_size=1",
            "--evaluation.source=pydoc",
            "--evaluation.num_samples=3",
            "--evaluation.seqlen=48",
            "--trainer.checkpoint_seconds=0",
        ]
        for name, words in METHODS.items()
    }


@pytest.fixture(scope="module")
def alone(
    settings: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs of one process, for which fsdp has no effect."""
    folders = {}
    for name, words in settings.items():
        folders[name] = tmp_path_factory.mktemp("alone") / name
        argv = ["compress", *words, "--trainer.strategy=fsdp", f"--output_dir={folders[name]}"]
        assert main(argv) == 0
    return folders


def assert_equal_models(first: Path, second: Path) -> None:
    """The saved models are the same to the byte."""
    names = {file.name for file in (first / "model").iterdir()} - {"README.md"}  # it has times
    assert "model.safetensors" in names
    for name in names:
        assert filecmp.cmp(first / "model" / name, second / "model" / name, shallow=False), name


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_that_share_a_model_decide_as_one_does(
    method: str, settings: dict[str, list[str]], alone: dict[str, Path], tmp_path: Path
) -> None:
    argv = ["compress", *settings[method], *SHARED, f"--output_dir={tmp_path / 'run'}"]
    done = run_ranks(argv, 2)
    assert done.codes == [0, 0], done.text
    assert done.text.count("model:  ") == 1
    is_tied = MODELS[method] == "qwen2"
    assert ("tied weights are whole in every process: model.embed" in done.text) == is_tied
    assert "UserWarning" not in done.text
    assert_equal_runs(alone[method], tmp_path / "run")
    assert_equal_models(alone[method], tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "place", "call", "later"),
    [
        ("one_shot", "predict_step", 2, SHARED),
        ("iterative", "training_step", 5, SHARED),  # in the second pass
        ("one_shot", "training_step", 2, []),
    ],
)
def test_killed_processes_go_on_to_the_same_decisions(  # noqa: PLR0917  parameters of pytest
    method: str,
    place: str,
    call: int,
    later: list[str],
    settings: dict[str, list[str]],
    alone: dict[str, Path],
    tmp_path: Path,
) -> None:
    where = Kill("grasp_lightning.training.calibration", "CalibrationModule", place, call)
    argv = ["compress", *settings[method], f"--output_dir={tmp_path / 'run'}"]
    assert run_ranks([*argv, *SHARED], 2, where).codes == [-signal.SIGKILL] * 2
    saved = [
        load_file(file)["windows"].tolist()
        for file in (tmp_path / "run" / "checkpoints").glob("pass-*")
    ]
    assert sorted(map(len, saved)) == [1, 1]  # each had counted one window
    assert saved[0] != saved[1]
    assert_success([*argv, *later], 2 if later else 1)
    assert_equal_runs(alone[method], tmp_path / "run")
    assert_equal_models(alone[method], tmp_path / "run")


def test_ctrl_c_ends_both_at_the_same_batch_and_a_later_start_resumes(
    settings: dict[str, list[str]], tmp_path: Path
) -> None:
    words = [
        *settings["one_shot"],
        "--calibration.num_samples=121",
        *SHARED,
        f"--output_dir={tmp_path / 'run'}",
    ]
    program = start("compress", *words)
    wait_for(tmp_path / "run" / "checkpoints", "pass-0-1.safetensors")
    os.kill(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 130, errors
    saved = [
        len(load_file(file)["windows"])
        for file in (tmp_path / "run" / "checkpoints").glob("pass-0-*")
    ]
    assert len(saved) == 2
    assert saved[0] == saved[1] < 60
    assert_success(["compress", *words], 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two processes in ``sharded_checks``, a file per check and process."""
    folder = tmp_path_factory.mktemp("results")
    script = Path(__file__).with_name("sharded_checks.py")
    run(script, folder, program=TORCHRUN, PYTHONPATH=str(ROOT))
    return folder


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes_check(check: str, results: Path) -> None:
    for rank in range(2):
        file = results / f"{check}.{rank}"
        assert file.exists(), "an earlier check has failed"
        assert file.read_text() == "ok"
