"""A killed training resumes and ends with the same bytes as an uninterrupted one."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv, compressed_folder
from tests.integration.forked import killed
from tests.integration.killing import Kill

WRITER = "grasp_lightning.run_folder.writer"
MODULE = ("grasp_lightning.training.compensation.module", "CompensationModule")
# 12 steps of 2 epochs, validations after 4, 8 and 12, each of 2 batches; 2 batches before.
KILLS: Mapping[str, Kill] = {
    "before the first step": Kill(*MODULE, "training_step", 1),
    "inside the first epoch": Kill(*MODULE, "training_step", 4),
    "after a validation": Kill(*MODULE, "training_step", 5),
    "inside the second epoch": Kill(*MODULE, "training_step", 9),
    "in a validation": Kill(*MODULE, "validation_step", 6),
    "at the start of a validation": Kill(*MODULE, "on_validation_epoch_start", 3),
    "in the last validation": Kill(*MODULE, "validation_step", 8),
    "after the last step": Kill("grasp_lightning.callbacks.export", "", "merge_adapters", 1),
    "while the model is written": Kill(
        "grasp_lightning.storage.model_folder",
        "",
        "copy_side_files",
        1,
    ),
    "while a checkpoint is written": Kill(
        "grasp_lightning.run_folder.files", "", "replace_synced", 18
    ),
}
OPTIONS = {
    "lora": ["--train=lora", "--lora.rank=4", "--lora.dropout=0.3", "--training.keep=best"],
    "factors": ["--train=factors", "--training.patience=3"],
    # Time for all steps.
    "all": ["--train=all", "--training.max_time=1h", "--training.keep=best"],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = compressed_folder(tmp_path_factory.mktemp("compressed"))
    return [
        *compensate_argv(model, tmp_path_factory.mktemp("data")),
        "--training.epochs=2",
        "--training.validate_every=4",
        "--optimizer.warmup_steps=2",
        "--trainer.checkpoint_seconds=0",
    ]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, by what is trained."""
    folders = {}
    for train, options in OPTIONS.items():
        folders[train] = tmp_path_factory.mktemp("whole") / train
        assert main(["compensate", *settings, *options, f"--output_dir={folders[train]}"]) == 0
    return folders


def assert_equal_runs(first: Path, second: Path) -> None:
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    contents = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    for content in contents:
        for key in ("seconds", "peak_memory_bytes", "tokens_per_second"):
            del content[key]
        if content["time_limit"]["max_seconds"] is not None:
            assert 0 < content["time_limit"].pop("seconds") < 3600
            assert content["time_limit"] == {"max_seconds": 3600, "planned_steps": 12}
            assert content["steps"] == 12
    assert contents[0] == contents[1]
    assert not (second / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "train"),
    [
        *((place, "lora") for place in KILLS),
        ("after a validation", "factors"),
        ("inside the first epoch", "all"),
        ("in the last validation", "all"),
        ("after the last step", "all"),
    ],
)
def test_a_killed_training_ends_with_the_bytes_of_one_that_was_not(
    place: str, train: str, settings: list[str], whole: dict[str, Path], tmp_path: Path
) -> None:
    argv = [*settings, *OPTIONS[train], f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS[place], signal.SIGKILL, ["compensate", *argv]) == -signal.SIGKILL
    assert (tmp_path / "run").is_dir()
    assert main(["compensate", *argv]) == 0
    assert_equal_runs(whole[train], tmp_path / "run")


@pytest.mark.slow
def test_a_killed_training_with_8_bit_states_ends_with_the_same_bytes(
    settings: list[str], tmp_path: Path
) -> None:
    # Parameters of fewer than 4096 values would keep float32 states.
    model = save_tiny(tmp_path / "wide", intermediate_size=160, max_position_embeddings=256)
    options = [f"--model.path={model}", "--train=all", "--optimizer.name=adamw_8bit"]
    argv = ["compensate", *settings, *options]
    assert main([*argv, f"--output_dir={tmp_path / 'whole'}"]) == 0
    argv.append(f"--output_dir={tmp_path / 'run'}")
    assert killed(KILLS["inside the second epoch"], signal.SIGKILL, argv) == -signal.SIGKILL
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "dtype=torch.uint8" in repr(saved["optimizer_states"])
    assert main(argv) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["inside the first epoch", "in a validation"])
def test_a_signal_saves_at_the_next_step_and_the_same_command_resumes(
    place: str, number: int, settings: list[str], whole: dict[str, Path], tmp_path: Path
) -> None:
    argv = [*settings, *OPTIONS["lora"], f"--output_dir={tmp_path / 'run'}"]
    argv.append("--trainer.checkpoint_seconds=1000")  # nothing else saves
    assert killed(KILLS[place], number, ["compensate", *argv]) == 128 + number
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert main(["compensate", *argv]) == 0
    assert_equal_runs(whole["lora"], tmp_path / "run")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_samples(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    lines = next(word for word in settings if word.startswith("--data.path=")).partition("=")[2]
    text = Path(lines).read_text()
    data.write_text(text)
    argv = [*settings, *OPTIONS["lora"], f"--data.path={data}", f"--output_dir={tmp_path / 'run'}"]
    assert (
        killed(KILLS["inside the first epoch"], signal.SIGKILL, ["compensate", *argv])
        == -signal.SIGKILL
    )
    data.write_text(text.replace("word", "work"))
    assert main(["compensate", *argv]) == 2
    assert "has changed since it started" in capsys.readouterr().err
