"""Layer-local training as a user runs it: every layer learns the dense model's hidden state."""

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.commands.training_inputs import run_bytes
from grasp_lightning.config import CompensateConfig, ModelConfig
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.streamed import StreamedWeights
from tests.conftest import save_tiny, tiny_model
from tests.integration.compensation import assert_equal_models, metrics_of, weights
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import ROOT, Kill

MODULE = ("grasp_lightning.training.local", "LocalModule")
COMMAND = "grasp_lightning.commands.local"
# 4 layers of 8 steps, and before the first step of each and after 3 and 6 a validation.
KILLS: Mapping[str, Kill] = {
    "inside the first layer": Kill(*MODULE, "training_step", 4),
    "in a validation of the second layer": Kill(*MODULE, "on_validation_epoch_start", 5),
    "inside the third layer": Kill(*MODULE, "training_step", 20),
    "between two layers": Kill(COMMAND, "LocalRun", "_take", 2),
    "after the last layer": Kill(COMMAND, "LocalRun", "_take", 4),
    "while the model is written": Kill(
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


def compress(dense: Path, run: Path, *more: str) -> Path:
    """Compress a tiny model of four layers, and return the folder of the result."""
    argv = [
        f"--model.path={dense}",
        "--calibration.source=pydoc",
        "--calibration.num_samples=4",
        "--calibration.seqlen=32",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
    ]
    assert main(["compress", *argv, *more, f"--output_dir={run}"]) == 0
    return run / "model"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def compressed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["--method.name=grasp", "--method.layers=[0,1,3]", "--method.keep_ratio=0.5"]
    return compress(dense, tmp_path_factory.mktemp("compressed") / "run", *more)


@pytest.fixture(scope="module")
def settings(compressed: Path, dense: Path) -> list[str]:
    return ["compensate", *options(compressed, dense)]


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


def test_every_layer_comes_closer_to_the_dense_model(
    settings: list[str], compressed: Path, tmp_path: Path
) -> None:
    # The last step of each layer is validated, so its weights can be kept.
    best = ["--training.validate_every=20", "--training.keep=best"]
    assert main([*settings, *best, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["steps"] == 4 * 8
    assert metrics["history"]["validation_steps"] == [8, 16, 24, 32]
    assert metrics["epochs"] == 2
    assert metrics["trained_tokens"] == 4 * 2 * 16 * 24
    assert metrics["validation_tokens"] == 6 * 24
    loss, errors = metrics["history"]["loss"], metrics["layer_errors"]
    assert list(errors) == ["0", "1", "2", "3"]
    for number, error in errors.items():
        assert error["after"] < 0.95 * error["before"]
        first = 8 * int(number)
        assert sum(loss[first + 4 : first + 8]) < sum(loss[first : first + 4])
    for when in ("before", "after"):
        mean = sum(error[when] for error in errors.values()) / 4
        assert metrics["validation_loss"][when] == pytest.approx(mean)
    assert metrics["parameters"]["before"] == metrics["parameters"]["after"]
    assert weights(tmp_path / "run").keys() == weights(compressed.parent).keys()
    assert not (tmp_path / "run" / "checkpoints").exists()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Mean error of the hidden states falls from" in report
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "the hidden states of the teacher `tiny` after each layer" in card


def test_hidden_states_on_disk_give_the_same_weights(settings: list[str], tmp_path: Path) -> None:
    more = ["--train=replaced", "--local.scale=token"]
    assert main([*settings, *more, f"--output_dir={tmp_path / 'memory'}"]) == 0
    more.append("--local.max_memory=0.00001")
    assert main([*settings, *more, f"--output_dir={tmp_path / 'disk'}"]) == 0
    assert_equal_models(tmp_path / "memory", tmp_path / "disk")
    metrics = metrics_of(tmp_path / "disk")
    assert metrics["steps"] == 3 * 8  # compression did not touch one layer
    assert metrics["validation_loss"]["after"] < metrics["validation_loss"]["before"]


def test_layers_without_an_error_stay_as_they_are(dense: Path, tmp_path: Path) -> None:
    run = tmp_path / "itself"
    assert main(["compensate", *options(dense, dense), f"--output_dir={run}"]) == 0
    metrics = metrics_of(run)
    assert metrics["steps"] == 0
    assert metrics["validation_loss"] == {"before": 0.0, "after": 0.0}
    before = load_file(dense / "model.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in weights(run).items())


@pytest.mark.slow
def test_layers_below_deleted_ones_stand_for_them_and_the_result_can_be_trained_further(
    dense: Path, tmp_path: Path
) -> None:
    model = compress(dense, tmp_path / "drop", "--method.name=drop", "--method.layers=[1,2]")
    words = ["compensate", *options(model, dense), "--model.dtype=bfloat16"]
    assert main([*words, f"--output_dir={tmp_path / 'local'}"]) == 0
    errors = metrics_of(tmp_path / "local")["layer_errors"]
    assert list(errors) == ["0", "1"]
    assert all(error["after"] < error["before"] for error in errors.values())
    first, second = ((tmp_path / run / "plan.json").read_bytes() for run in ("drop", "local"))
    assert first == second

    again = options(tmp_path / "local" / "model", dense)
    argv = ["compensate", *again, "--model.dtype=bfloat16"]
    assert main([*argv, f"--output_dir={tmp_path / 'again'}"]) == 0
    later = metrics_of(tmp_path / "again")["layer_errors"]
    for number, error in errors.items():
        assert later[number]["before"] == pytest.approx(error["after"], rel=0.05)
    more = ["--distillation.data=text", "--model.dtype=float32", "--optimizer.learning_rate=0.0003"]
    distill = [*again, "--objective=distill", *more]
    assert main(["compensate", *distill, f"--output_dir={tmp_path / 'distill'}"]) == 0
    losses = metrics_of(tmp_path / "distill")["validation_loss"]
    assert losses["after"] < losses["before"]


@pytest.mark.slow
@pytest.mark.parametrize("place", KILLS)
def test_a_killed_training_ends_with_the_bytes_of_one_that_was_not(
    place: str, resumable: list[str], whole: Path, tmp_path: Path
) -> None:
    argv = [*resumable, f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS[place], signal.SIGKILL, argv) == -signal.SIGKILL
    assert (tmp_path / "run").is_dir()
    assert main(argv) == 0
    assert_equal_models(whole, tmp_path / "run")
    contents = [metrics_of(folder) for folder in (whole, tmp_path / "run")]
    for content in contents:
        for key in ("seconds", "peak_memory_bytes", "tokens_per_second"):
            del content[key]
        assert 0 < content["time_limit"].pop("seconds") < 3600
        assert content["time_limit"] == {"max_seconds": 3600, "planned_steps": 32}
    assert contents[0] == contents[1]
    assert len(contents[0]["history"]["validation_loss"]) == 4 * 3  # after the last step, too
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_streamed_training_gives_the_bytes_of_a_whole_one(
    resumable: list[str], whole: Path, tmp_path: Path
) -> None:
    argv = [*resumable, "--model.loading=streamed", f"--output_dir={tmp_path / 'run'}"]
    for place in ("inside the third layer", "between two layers", "while the model is written"):
        assert killed(KILLS[place], signal.SIGKILL, argv) == -signal.SIGKILL
    assert main(argv) == 0
    assert_equal_models(whole, tmp_path / "run")
    contents = [metrics_of(folder) for folder in (whole, tmp_path / "run")]
    for key in ("history", "layer_errors", "validation_loss", "parameters", "steps"):
        assert contents[0][key] == contents[1][key]
    first, second = (content["perplexity"] for content in contents)
    assert second == pytest.approx(first, rel=1e-6)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_streamed_training_holds_one_layer_of_each_model(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[StreamedWeights, int] = {}
    load = StreamedWeights._load

    def noted(weights: StreamedWeights, index: int) -> None:
        load(weights, index)
        held[weights] = max(held.get(weights, 0), len(weights._loaded))

    monkeypatch.setattr(StreamedWeights, "_load", noted)
    more = ["--model.loading=streamed", "--local.max_memory=1e-6"]
    assert main([*settings, *more, f"--output_dir={tmp_path / 'run'}"]) == 0
    assert list(held.values()) == [1, 1]  # of the model and its teacher


def test_a_streamed_training_refuses_a_model_that_cannot_be_streamed(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.loading=streamed", f"--output_dir={tmp_path / 'run'}"]
    for words, message in (
        (
            ["--distillation.teacher=smollm2"],
            "distillation.teacher: model.loading is streamed",
        ),
        (["--objective=distill"], "objective distill trains the whole model"),
    ):
        for how in ([], ["--dry_run"]):
            assert main([*settings, *words, *more, *how]) == 2
            (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
            assert message in error
            assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_does(resumable: list[str], whole: Path, tmp_path: Path) -> None:
    argv = [*resumable, "--trainer.devices=2", f"--output_dir={tmp_path / 'both'}"]
    outcome = run_ranks(argv, 2)
    assert outcome.codes == [0, 0], outcome.text
    alone, both = metrics_of(whole), metrics_of(tmp_path / "both")
    for key in ("loss", "validation_loss", "learning_rate"):
        assert both["history"][key] == pytest.approx(alone["history"][key], rel=1e-4)
    for number, error in alone["layer_errors"].items():
        assert both["layer_errors"][number] == pytest.approx(error, rel=1e-4)


def test_the_time_is_shared_by_all_layers(settings: list[str], tmp_path: Path) -> None:
    more = ["--training.epochs=100000", "--training.max_time=4s", "--optimizer.warmup_steps=100"]
    assert main([*settings, *more, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics = metrics_of(tmp_path / "run")
    limit = metrics["time_limit"]
    assert metrics["steps"] >= 4
    assert metrics["steps"] <= limit["planned_steps"]
    assert limit["seconds"] < 8


@pytest.mark.parametrize(
    ("options_", "message"),
    [
        (["--train=lora"], "objective: local trains weights themselves, but train is lora"),
        (["--trainer.strategy=fsdp"], "objective: local trains one layer at a time"),
        (["--training.gradient_checkpointing=true"], "gradient_checkpointing is True, but would"),
        (["--training.patience=2"], "training.patience is 2, but would be ignored"),
        (["--distillation.mix=0.5"], "distillation.mix is 0.5, but would be ignored"),
        (
            ["--objective=text", "--distillation.teacher=null", "--local.scale=token"],
            "local.scale is 'token', but would be ignored: objective is text, not local",
        ),
        (["--distillation.teacher=null"], "objective: local needs distillation.teacher"),
        (["--distillation.teacher=DEEP"], "cannot match the 4 decoder layers of the model to the"),
        (["--distillation.teacher=WIDE"], "distillation.teacher has 64 features in its hidden"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options_: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if any("DEEP" in word for word in options_):
        save_tiny(tmp_path / "DEEP", num_hidden_layers=6)
    if any("WIDE" in word for word in options_):
        save_tiny(tmp_path / "WIDE", hidden_size=64)
    words = [word.replace("=DEEP", f"={tmp_path}/DEEP") for word in options_]
    words = [word.replace("=WIDE", f"={tmp_path}/WIDE") for word in words]
    for how in ([], ["--dry_run"]):
        assert main([*settings, *words, *how, f"--output_dir={tmp_path / 'run'}"]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert message in error
        assert not (tmp_path / "run").exists()


def test_the_disk_needs_room_for_the_optimizer_of_one_layer_at_a_time() -> None:
    view = DecoderView(tiny_model())  # 4 layers in float32
    config = CompensateConfig(model=ModelConfig(path="m"), train="all")
    found = [
        run_bytes(replace(config, objective=objective), view, 1000, 800)
        for objective in ("distill", "local")
    ]
    assert found == [int(1.1 * (4 * 1000 + 32 * 800)), int(1.1 * (4 * 1000 + 4 * 800 + 32 * 200))]


def test_plan_shows_its_memory(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = ["--method.name=grasp", "--method.layers=[1]", "--method.keep_ratio=0.5"]
    file = f"--compensate={ROOT / 'configs/compensate/local.yaml'}"
    assert main(["plan", f"--model.path={dense}", *method, file]) == 0
    table = capsys.readouterr().out.partition("compensation with")[2]
    # (512 + 16) windows of 2048 tokens, 32 float32 values in each of two models.
    assert "with hidden states, 276.82 in one process, or" in table
    assert "fsdp" not in table
    assert "lora" not in table
