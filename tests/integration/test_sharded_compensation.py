"""Strategies that split a training over processes lead to what one process leads to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.integration.compensation import compensate_argv, compressed_folder
from tests.integration.killing import Kill
from tests.integration.ranks import run_ranks

pytestmark = pytest.mark.slow

STEP = Kill("grasp_lightning.training.compensation.module", "CompensationModule", "training_step", 4)
STRATEGIES = ("fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
OFFLOADING = ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = compressed_folder(tmp_path_factory.mktemp("compressed"))
    return [
        "compensate",
        *compensate_argv(model, tmp_path_factory.mktemp("samples")),
        # 14 samples: steps of 3 and 3 and of 1 and 1 rows per process, in parts of 2.
        "--data.num_validation=5",
        "--data.num_train=14",
        "--training.batch_size=6",
        "--training.micro_batch_size=2",
        "--training.epochs=2",
        "--training.validate_every=2",
        "--training.keep=best",
        "--evaluation.num_samples=3",
        "--trainer.checkpoint_seconds=0",
    ]


LORA = ("--train=lora", "--lora.rank=4", "--lora.dropout=0")
TRAINED = {
    "lora": LORA,
    "factors": ("--train=factors",),
    "lora_on_factors": ("--train=lora_on_factors", *LORA[1:]),
}


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, by what is trained."""
    folders = {}
    for train, options in TRAINED.items():
        folders[train] = tmp_path_factory.mktemp("alone") / train
        assert main([*settings, *options, f"--output_dir={folders[train]}"]) == 0
    return folders


def metrics(folder: Path) -> dict:
    content: dict = json.loads((folder / "metrics.json").read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_close_runs(first: Path, second: Path) -> None:
    left, right = metrics(first), metrics(second)
    for key in ("loss", "validation_loss", "learning_rate"):
        assert right["history"][key] == pytest.approx(left["history"][key], rel=1e-5)
    for key in ("perplexity", "validation_loss"):
        assert right[key] == pytest.approx(left[key], rel=1e-5)
    for key in ("parameters", "trained_tokens", "best_step", "bytes", "steps"):
        assert left[key] == right[key]
    for key, values in weights(first).items():
        torch.testing.assert_close(weights(second)[key], values, rtol=0, atol=1e-5)
    assert not (second / "checkpoints").exists()


def sharded(settings: list[str], strategy: str, folder: Path, number: int = 2) -> list[str]:
    return [
        *settings,
        f"--trainer.strategy={strategy}",
        f"--trainer.devices={number}",
        f"--output_dir={folder}",
    ]


@pytest.mark.parametrize("train", ["lora", "factors"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one_does_whether_killed_or_not(
    strategy: str, train: str, settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    settings = [*settings, *TRAINED[train]]
    whole = sharded(settings, strategy, tmp_path / "whole")
    done = run_ranks(whole, 2, tmp_path)
    assert done.codes == [0, 0], done.text
    assert_close_runs(alone[train], tmp_path / "whole")
    interrupted = sharded(settings, strategy, tmp_path / "killed")
    assert run_ranks(interrupted, 2, tmp_path, STEP).codes == [-9, -9]
    assert (tmp_path / "killed" / "checkpoints" / "last.ckpt").is_file()
    done = run_ranks(interrupted, 2, tmp_path)
    assert done.codes == [0, 0], done.text
    assert metrics(tmp_path / "killed")["history"] == metrics(tmp_path / "whole")["history"]
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(left[key], right[key]) for key in left)
