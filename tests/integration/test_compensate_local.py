"""Layer-local training as a user runs it: every layer learns the dense model's hidden state."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import compressed_folder
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill

MODULE = ("grasp_lightning.training.local", "LocalModule")
COMMAND = "grasp_lightning.commands.local"
# 4 layers of 8 steps each, validations after 3 and 6.
KILLS: Mapping[str, Kill] = {
    "inside the first layer": Kill(*MODULE, "training_step", 4),
    "in a validation of the second layer": Kill(*MODULE, "on_validation_epoch_start", 4),
    "inside the third layer": Kill(*MODULE, "training_step", 20),
    "between two layers": Kill(COMMAND, "LocalRun", "_take", 2),
    "after the last layer": Kill(COMMAND, "LocalRun", "_take", 4),
    "before the model is written": Kill(
        "grasp_lightning.storage.model_folder", "", "copy_side_files", 1
    ),
}


def options(model: Path, teacher: Path) -> list[str]:
    """Return the options of a training of 8 steps per layer, all but its output folder."""
    return [
        f"--model.path={model}",
        "--objective=local",
        "--train=all",
        f"--distillation.teacher={teacher}",
        "--text.source=pydoc",
        "--text.num_samples=16",
        "--text.num_validation=6",
        "--text.seqlen=24",
        "--training.epochs=2",
        "--training.batch_size=4",
        "--training.micro_batch_size=3",
        "--optimizer.learning_rate=0.01",
        "--optimizer.warmup_steps=1",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
    ]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="module")
def settings(compressed: Path) -> list[str]:
    return ["compensate", *options(compressed, compressed.parent.parent / "tiny")]


@pytest.fixture(scope="module")
def resumable(settings: list[str]) -> list[str]:
    return [
        *settings,
        "--training.validate_every=3",
        "--training.keep=best",
        "--training.max_time=1h",  # for all steps
        "--trainer.checkpoint_seconds=0",
    ]


@pytest.fixture(scope="module")
def whole(resumable: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*resumable, f"--output_dir={folder}"]) == 0
    return folder


def metrics_of(folder: Path) -> dict:
    content: dict = json.loads((folder / "metrics.json").read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_layer_comes_closer_to_the_dense_model(
    settings: list[str], compressed: Path, tmp_path: Path
) -> None:
    assert main([*settings, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["steps"] == 4 * 8
    assert metrics["epochs"] == 2
    assert metrics["trained_tokens"] == 4 * 2 * 16 * 24
    assert metrics["validation_tokens"] == 6 * 24
    loss = metrics["history"]["loss"]
    errors = metrics["layer_errors"]
    assert list(errors) == ["0", "1", "2", "3"]
    changed = [number for number, error in errors.items() if error["before"] > 1e-9]
    for number in changed:
        assert errors[number]["after"] < errors[number]["before"]
        first = 8 * int(number)
        assert sum(loss[first + 4 : first + 8]) < sum(loss[first : first + 4])
    for when in ("before", "after"):
        mean = sum(error[when] for error in errors.values()) / 4
        assert metrics["validation_loss"][when] == pytest.approx(mean)
    parameters = metrics["parameters"]
    assert parameters["before"] == parameters["after"]
    assert weights(tmp_path / "run" / "model").keys() == weights(compressed).keys()
    assert not (tmp_path / "run" / "checkpoints").exists()
