"""Strategies that shard a training over processes give the same result as one process."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.config import ModelConfig
from grasp_lightning.models.loading import load_model
from tests.integration.compensation import compensate_argv
from tests.integration.forked import run_ranks
from tests.integration.killing import Kill
from tests.integration.test_removal import save_with_idle_parts, words

pytestmark = pytest.mark.slow

STEP = Kill(
    "grasp_lightning.training.compensation.module", "CompensationModule", "training_step", 4
)
GATHER = Kill("grasp_lightning.callbacks.split_model", "GatherTrained", "on_fit_end", 1)
# DeepSpeed stores and resumes stage 1 by the code of stage 2.
STRATEGIES = ("fsdp", "deepspeed_stage_2", "deepspeed_stage_3")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compressed")
    # Linears of rank 0, too, whose weights have no elements.
    source = save_with_idle_parts(folder / "source", "llama", max_position_embeddings=256)
    assert main(["compress", *words(source, folder / "run", 0.35)]) == 0
    return [
        "compensate",
        *compensate_argv(folder / "run" / "model", tmp_path_factory.mktemp("samples")),
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
    "all": ("--train=all",),
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


def setting(settings: list[str], key: str) -> str:
    return next(word for word in settings if word.startswith(f"--{key}=")).partition("=")[2]


def sharded(settings: list[str], strategy: str, folder: Path, number: int = 2) -> list[str]:
    return [
        *settings,
        f"--trainer.strategy={strategy}",
        f"--trainer.devices={number}",
        f"--output_dir={folder}",
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one_does_whether_killed_or_not(
    strategy: str, settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    settings = [*settings, *LORA]
    whole = sharded(settings, strategy, tmp_path / "whole")
    done = run_ranks(whole, 2)
    assert done.codes == [0, 0], done.text
    assert_close_runs(alone["lora"], tmp_path / "whole")
    interrupted = sharded(settings, strategy, tmp_path / "killed")
    assert run_ranks(interrupted, 2, STEP).codes == [-9, -9]
    assert (tmp_path / "killed" / "checkpoints" / "last.ckpt").is_file()
    done = run_ranks(interrupted, 2)
    assert done.codes == [0, 0], done.text
    assert metrics(tmp_path / "killed")["history"] == metrics(tmp_path / "whole")["history"]
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("strategy", "train", "number"),
    [
        ("ddp", "all", 2),
        ("fsdp", "all", 2),
        ("deepspeed_stage_1", "all", 2),
        ("deepspeed_stage_2", "all", 2),
        ("deepspeed_stage_3", "all", 2),
        ("deepspeed_stage_2", "lora_on_factors", 2),
        ("deepspeed_stage_2_offload", "lora", 1),
        ("deepspeed_stage_3_offload", "lora", 2),
    ],
)
def test_other_ways_to_train_and_offloading_give_the_same_result(  # noqa: PLR0917  parameters of pytest
    strategy: str,
    train: str,
    number: int,
    settings: list[str],
    alone: dict[str, Path],
    tmp_path: Path,
) -> None:
    argv = sharded([*settings, *TRAINED[train]], strategy, tmp_path / "run", number)
    done = run_ranks(argv, number)
    assert done.codes == [0] * number, done.text
    assert_close_runs(alone[train], tmp_path / "run")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("deepspeed_stage_3", 2), ("fsdp", 1)),
        (("auto", 1), ("deepspeed_stage_2", 2)),
        (("fsdp", 2), ("auto", 1)),
    ],
)
def test_a_killed_training_resumes_under_another_strategy_in_other_processes(
    first: tuple[str, int],
    second: tuple[str, int],
    settings: list[str],
    alone: dict[str, Path],
    tmp_path: Path,
) -> None:
    settings = [*settings, *LORA]
    killed = run_ranks(sharded(settings, first[0], tmp_path / "run", first[1]), first[1], STEP)
    assert killed.codes == [-9] * first[1]
    argv = sharded(settings, second[0], tmp_path / "run", second[1])
    done = run_ranks(argv, second[1])
    assert done.codes == [0] * second[1], done.text
    assert_close_runs(alone["lora"], tmp_path / "run")


def test_a_signal_saves_at_the_next_step_in_all_processes(
    settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    argv = sharded([*settings, *LORA], "deepspeed_stage_2", tmp_path / "run")
    stopped = [*argv, "--trainer.checkpoint_seconds=1000"]  # nothing else saves
    done = run_ranks(stopped, 2, STEP, signal.SIGTERM)
    assert done.codes == [128 + signal.SIGTERM] * 2, done.text
    done = run_ranks(stopped, 2)
    assert done.codes == [0, 0], done.text
    assert_close_runs(alone["lora"], tmp_path / "run")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_the_exported_model_computes_what_the_trained_weights_do(
    strategy: str, settings: list[str], tmp_path: Path
) -> None:
    argv = sharded([*settings, *LORA, "--training.keep=last"], strategy, tmp_path / "run")
    assert run_ranks(argv, 2, GATHER).codes == [-9, -9]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    trained = checkpoint["state_dict"]
    assert all(value.dtype == torch.float32 for value in trained.values())
    model = load_model(ModelConfig(path=setting(settings, "model.path"))).model
    linears = dict(model.named_modules())
    with torch.no_grad():
        for name in (key for key in trained if ".lora_A." in key):
            linear = linears[name.removeprefix("model.").partition(".lora_A.")[0]]
            right, left = trained[name], trained[name.replace("lora_A", "lora_B")]
            assert left.any()
            linear.weight += 16 / 4 * left @ right
    done = run_ranks(argv, 2)
    assert done.codes == [0, 0], done.text
    exported = load_model(ModelConfig(path=str(tmp_path / "run" / "model"))).model
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_the_program_starts_the_processes_of_fsdp_itself(
    settings: list[str], alone: dict[str, Path], tmp_path: Path
) -> None:
    argv = sharded([*settings, *LORA], "fsdp", tmp_path / "run")
    done = run_ranks(argv, 1)
    assert done.codes == [0], done.text
    assert done.text.count("model:  ") == 1
    assert_close_runs(alone["lora"], tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.dtype=bfloat16"], "would convert the weights from torch.bfloat16 into float32"),
        (["--optimizer.gradient_clip=-1"], "optimizer.gradient_clip must be above 0"),
    ],
)
def test_settings_that_deepspeed_cannot_follow_are_one_line(
    options: list[str], message: str, settings: list[str], tmp_path: Path
) -> None:
    argv = sharded([*settings, *LORA, *options], "deepspeed_stage_2", tmp_path / "run", 1)
    done = run_ranks(argv, 1)
    assert done.codes == [2]
    assert [message in line for line in done.text.splitlines() if "error" in line] == [True]
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused_without_a_gpu(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    argv = sharded([*settings, *LORA], "deepspeed_stage_2", tmp_path / "run", 1)
    assert main(argv) == 2
    assert "deepspeed_stage_2 needs CUDA devices" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
