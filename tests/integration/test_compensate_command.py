"""``compensate`` as a user runs it: files, table, the saved model, and one line per mistake."""

import csv
import json
from pathlib import Path
from statistics import median
from typing import get_args

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grasp_lightning.callbacks import ExportMergedModel, TrainableParameters
from grasp_lightning.cli import main
from grasp_lightning.config import (
    InstructionConfig,
    LoraSettings,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    TrainMode,
)
from grasp_lightning.data.datamodules import InstructionData
from grasp_lightning.data.instruction_files import InstructionSample
from grasp_lightning.data.instructions import alpaca_prompt
from grasp_lightning.models.loading import load_model
from grasp_lightning.models.lowrank import ranks_of
from grasp_lightning.models.size import count_parameters
from grasp_lightning.training.compensation import CompensationModule
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv, compressed_folder, write_samples

IDS = torch.arange(40).view(2, 20)
MODES: tuple[TrainMode, ...] = get_args(TrainMode)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tmp_path_factory.mktemp("compressed"))


@pytest.fixture
def settings(compressed: Path, tmp_path: Path) -> list[str]:
    return [
        *compensate_argv(compressed, tmp_path),
        "--training.max_steps=4",
        "--lora.rank=4",
        f"--output_dir={tmp_path / 'run'}",
    ]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(IDS).logits
    return scores


def metrics_of(folder: Path) -> dict:
    content: dict = json.loads((folder / "metrics.json").read_text())
    return content


def test_a_run_writes_what_the_design_names(settings: list[str], tmp_path: Path) -> None:
    assert main(["compensate", *settings, "--training.validate_every=2"]) == 0
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "plan.json", "metrics.json", "report.html"),
        *("model", "logs", "manifest.json"),
    }
    metrics = metrics_of(folder)
    assert metrics["parameters"]["before"] == metrics["parameters"]["after"]
    assert 0 < metrics["parameters"]["trainable"] < metrics["parameters"]["after"]
    assert metrics["validation_loss"]["after"] < metrics["validation_loss"]["before"]
    assert metrics["perplexity"]["before"] > 0
    assert metrics["perplexity"]["after"] != metrics["perplexity"]["before"]
    assert metrics["steps"] == 4
    assert set(metrics["time_limit"].values()) == {None}
    assert metrics["samples"]["train"] == 24
    assert metrics["samples"]["validation"] == 6
    assert metrics["history"]["validation_steps"] == [2, 4]
    assert metrics["history"]["validation_loss"][1] == pytest.approx(
        metrics["validation_loss"]["after"], rel=1e-5
    )
    assert {"torch", "lightning", "transformers", "peft"} <= metrics["versions"].keys()
    with (folder / "logs" / "start_1" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    speeds = [float(row["tokens_per_second"]) for row in rows]
    assert metrics["tokens_per_second"] == pytest.approx(median(speeds), rel=1e-4)
    assert [float(row["loss"]) for row in rows] == pytest.approx(metrics["history"]["loss"])
    assert "Compensation" in (folder / "model" / "README.md").read_text()


def test_a_finished_run_is_printed_and_not_done_again(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compensate", *settings]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert main(["compensate", *settings]) == 0
    assert "trainable parameters" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


class _LogitsBeforeMerging(L.Callback):
    """Keeps the output of the trained module while it still has adapters."""

    logits: Tensor

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del trainer
        assert isinstance(pl_module, CompensationModule)
        pl_module.model.eval()
        self.logits = logits(pl_module.model)


@pytest.mark.parametrize("train", MODES)
def test_the_saved_model_is_the_trained_one_without_adapters(
    train: TrainMode, compressed: Path, tmp_path: Path
) -> None:
    loaded = load_model(ModelConfig(path=str(compressed)))
    before, parameters, ranks = (
        logits(loaded.model),
        count_parameters(loaded.model),
        ranks_of(loaded.model),
    )
    data = InstructionData(
        InstructionConfig(
            source="file",
            path=str(write_samples(tmp_path / "samples.jsonl")),
            num_validation=0,
            max_length=250,
        ),
        loaded.tokenizer,
        TrainingConfig(batch_size=4, micro_batch_size=2, max_steps=5),
    )
    kept = _LogitsBeforeMerging()
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[
            TrainableParameters(train, LoraSettings(rank=4)),
            kept,
            ExportMergedModel(tmp_path / "model", loaded.tokenizer),
        ],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CompensationModule(loaded.model, OptimizerConfig(learning_rate=0.01, warmup_steps=1))
    trainer.fit(module, datamodule=data)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    difference = (logits(reloaded) - kept.logits).abs().max()
    assert difference <= 1e-5 * kept.logits.abs().max()
    assert torch.equal(logits(reloaded), logits(module.model))
    assert (logits(reloaded) - before).abs().max() > 100 * difference
    assert count_parameters(reloaded) == parameters
    assert ranks_of(reloaded) == ranks
    assert not [name for name, _ in reloaded.named_modules() if "lora" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a")["input_ids"]


def test_plain_text_is_learned_with_the_objective_text(compressed: Path, tmp_path: Path) -> None:
    argv = [
        f"--model.path={compressed}",
        "--train=factors",
        "--objective=text",
        "--text.source=pydoc",
        "--text.num_samples=12",
        "--text.num_validation=4",
        "--text.seqlen=32",
        "--training.batch_size=4",
        "--optimizer.learning_rate=0.01",
        "--optimizer.warmup_steps=1",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=4",
        "--evaluation.seqlen=32",
        f"--output_dir={tmp_path / 'run'}",
    ]
    assert main(["compensate", *argv]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["perplexity"]["after"] < metrics["perplexity"]["before"]
    assert metrics["data_licence"] == "PSF License Agreement, version 2"


@pytest.mark.slow
def test_a_teacher_is_learned_from(compressed: Path, settings: list[str], tmp_path: Path) -> None:
    teacher = compressed.parent.parent / "tiny"
    options = [
        "--objective=distill",
        f"--distillation.teacher={teacher}",
        "--distillation.mix=1",
        "--training.epochs=3",
        "--training.max_steps=18",
    ]
    assert main(["compensate", *settings, *options]) == 0
    dense = AutoModelForCausalLM.from_pretrained(teacher)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (compressed, tmp_path / "run" / "model")
    )
    prompt = alpaca_prompt(InstructionSample("say 3", "x", ""))
    ids = AutoTokenizer.from_pretrained(compressed)(prompt, return_tensors="pt").input_ids

    def log_probs(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            scores: Tensor = model(ids).logits.log_softmax(-1)
        return scores

    target = log_probs(dense)

    def divergence(model: PreTrainedModel) -> float:
        scores = log_probs(model)
        return float((target.exp() * (target - scores)).sum(-1).mean())

    assert divergence(after) < divergence(before)


@pytest.mark.parametrize("order", ["packed", "length_grouped"])
def test_batches_may_be_ordered_otherwise(order: str, settings: list[str], tmp_path: Path) -> None:
    assert main(["compensate", *settings, f"--data.order={order}"]) == 0
    loss = metrics_of(tmp_path / "run")["validation_loss"]
    assert loss["after"] < loss["before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "options", "stored"),
    [
        ("lora", ["--trainer.precision=bf16-mixed"], torch.float32),
        ("factors", ["--trainer.precision=bf16-mixed", "--lora.rank=256"], torch.float32),
        ("lora", ["--model.dtype=bfloat16"], torch.bfloat16),
        ("lora", ["--model.dtype=bfloat16", "--data.order=packed"], torch.bfloat16),
    ],
)
def test_precision_of_computing_and_of_storing_are_apart(
    train: str, options: list[str], stored: torch.dtype, settings: list[str], tmp_path: Path
) -> None:
    assert main(["compensate", *settings, f"--train={train}", *options]) == 0
    loss = metrics_of(tmp_path / "run")["validation_loss"]
    assert loss["after"] < loss["before"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {stored}


@pytest.mark.slow
def test_activations_can_be_computed_again_to_save_memory(
    settings: list[str], tmp_path: Path
) -> None:
    losses = []
    for name in ("false", "true"):
        options = [
            f"--training.gradient_checkpointing={name}",
            "--lora.dropout=0",
            f"--output_dir={tmp_path / name}",
        ]
        assert main(["compensate", *settings, *options]) == 0
        losses.append(metrics_of(tmp_path / name)["history"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_tensorboard_files_are_written_if_asked_for(settings: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    assert main(["compensate", *settings, "--loggers.tensorboard"]) == 0
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_a_compensated_model_works_in_other_commands(settings: list[str], tmp_path: Path) -> None:
    assert main(["compensate", *settings]) == 0
    model = tmp_path / "run" / "model"
    assert main(["export", f"--model={model}", f"--output_dir={tmp_path / 'dense'}"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "model")
    trained = AutoModelForCausalLM.from_pretrained(model)
    assert (logits(dense) - logits(trained)).abs().max() <= 1e-5 * logits(trained).abs().max()
    argv = ["--corpora=pydoc", "--evaluation.seqlen=32", "--evaluation.num_samples=2"]
    assert main(["evaluate", f"--model={model}", *argv]) == 0
    assert metrics_of(tmp_path / "run")["evaluation"]["corpora"]["pydoc"]["perplexity"] > 0
    again = [f"--model.path={model}", f"--output_dir={tmp_path / 'again'}"]
    assert main(["compensate", *settings, *again]) == 0
    assert metrics_of(tmp_path / "again")["model"] == "tiny"


def test_an_upload_that_fails_keeps_the_model_and_can_be_tried_again(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["compensate", *settings, "--push_to_hub=owner/name"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: push_to_hub: cannot upload to owner/name")
        assert "run the same command again" in error
    assert metrics_of(tmp_path / "run")["steps"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.rank=0"], "lora.rank must be at least 1, got 0"),
        (
            ["--lora.targets=gate"],
            "no linear matches 'gate'; the linears are: down_proj, gate_proj",
        ),
        (["--optimizer.warmup_steps=4"], "optimizer.warmup_steps is 4, but there are only 4 steps"),
        (["--data.max_length=300"], "data.max_length is 300, but the model has 256 positions"),
        (["--data.num_validation=30"], "data.num_validation is 30"),
        (["--objective=distill"], "objective: distill needs distillation.teacher"),
        (
            ["--model.dtype=bfloat16", "--train=all", "--lora.rank=256"],
            "train: all would train weights in torch.bfloat16, which is too coarse",
        ),
        (
            ["--train=sideways"],
            "train: expected one of lora, factors, lora_on_factors, replaced, all",
        ),
        (
            ["--training.max_time=soon"],
            "training.max_time must be a time such as 90s, 30m or 2h, got 'soon'",
        ),
        (["--training.max_time=0m"], "training.max_time must be a time such as 90s"),
        (
            ["--optimizer.name=adamw_8bit", "--trainer.strategy=fsdp"],
            "optimizer.name adamw_8bit cannot divide its states between processes",
        ),
        (["--trainer.num_nodes=2"], "trainer.num_nodes is 2: start the command on every node"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compensate", *settings, *options]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a"}',
            "line 2 has no field 'output'",
        ),
        ('{"output": "b"}', "line 1 has no field 'instruction'"),
        ("nonsense", "line 1 is not JSON"),
    ],
)
def test_samples_that_cannot_be_read_are_named_by_file_and_line(
    content: str,
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "samples.jsonl").write_text(content)
    assert main(["compensate", *settings]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {tmp_path / 'samples.jsonl'}" in error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_factors_of_a_model_that_has_none_are_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = save_tiny(tmp_path / "dense", max_position_embeddings=256)
    options = [f"--model.path={dense}", "--train=lora_on_factors"]
    assert main(["compensate", *settings, *options]) == 2
    assert "train: lora_on_factors needs a model with low-rank linears" in capsys.readouterr().err


def test_a_teacher_of_another_vocabulary_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tmp_path / "other", vocab_size=300)
    options = ["--objective=distill", f"--distillation.teacher={other}"]
    assert main(["compensate", *settings, *options]) == 2
    assert (
        "has a different vocabulary from the model (300 and 260 tokens)" in capsys.readouterr().err
    )


def test_the_model_s_own_folder_is_not_written(
    compressed: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compensate", *settings, f"--output_dir={compressed}"]) == 2
    assert "must not change" in capsys.readouterr().err
