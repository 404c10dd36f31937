"""Distillation as a user runs it: mixtures, text of the dense model, and a cached teacher."""

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.commands import teacher
from grasp_lightning.config import ModelConfig
from grasp_lightning.models.loading import LoadedModel
from tests.integration.compensation import (
    assert_equal_models,
    compensate_argv,
    compressed_folder,
    metrics_of,
)
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill

IN_THE_CACHE = Kill("grasp_lightning.commands.teacher", "", "predictions_of", 2)
VOCABULARY = 260


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="module")
def settings(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        *compensate_argv(compressed, tmp_path_factory.mktemp("data")),
        "--lora.rank=4",
        "--lora.dropout=0",
        "--training.epochs=2",
        "--training.max_steps=6",
        "--data.order=packed",
        "--objective=distill",
        f"--distillation.teacher={compressed.parent.parent / 'tiny'}",
    ]


def text_options(compressed: Path, folder: Path) -> list[str]:
    (folder / "qa.jsonl").write_text('{"instruction": "say it", "output": "it"}\n' * 40)
    return [
        f"--model.path={compressed}",
        "--train=factors",
        "--text.source=[pydoc, instructions, self]",
        f"--text.path=[{folder / 'qa.jsonl'}]",
        "--text.weights=[2, 1, 1]",
        "--text.num_samples=8",
        "--text.num_validation=4",
        "--text.seqlen=24",
        "--training.batch_size=4",
        "--optimizer.warmup_steps=1",
        "--optimizer.learning_rate=0.01",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
        f"--distillation.teacher={compressed.parent.parent / 'tiny'}",
    ]


def refuse_to_load(config: ModelConfig) -> LoadedModel:
    pytest.fail(f"{config.path} is loaded")


def test_a_cached_teacher_runs_once_for_all_runs_and_teaches_the_same(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = [
        *settings,
        "--distillation.cache=true",
        f"--distillation.top_k={VOCABULARY}",
        f"--distillation.cache_dir={tmp_path / 'cache'}",
    ]
    assert main(["compensate", *settings, f"--output_dir={tmp_path / 'live'}"]) == 0
    assert main(["compensate", *cached, f"--output_dir={tmp_path / 'first'}"]) == 0
    monkeypatch.setattr(teacher, "load_model", refuse_to_load)
    other = ["--data.order=length_grouped", "--training.epochs=1"]
    assert main(["compensate", *cached, *other, f"--output_dir={tmp_path / 'other'}"]) == 0
    assert main(["compensate", *cached, f"--output_dir={tmp_path / 'second'}"]) == 0
    assert_equal_models(tmp_path / "first", tmp_path / "second")
    live, first = (metrics_of(tmp_path / name) for name in ("live", "first"))
    assert first["history"]["loss"] == pytest.approx(live["history"]["loss"], rel=2e-3)
    for when in ("before", "after"):
        assert first["validation_loss"][when] == pytest.approx(live["validation_loss"][when], 2e-3)
    assert first["validation_loss"]["after"] < first["validation_loss"]["before"]
    assert first["seconds"]["teacher"] > 0


def test_a_run_killed_in_the_cache_goes_on_with_it(settings: list[str], tmp_path: Path) -> None:
    argv = [*settings, "--distillation.cache=true", "--data.order=shuffled"]
    whole, run = (f"--output_dir={tmp_path / name}" for name in ("whole", "run"))
    assert main(["compensate", *argv, whole]) == 0
    assert killed(IN_THE_CACHE, signal.SIGKILL, ["compensate", *argv, run]) == -signal.SIGKILL
    assert len(list((tmp_path / "run" / "checkpoints").glob("teacher-*"))) == 1
    assert main(["compensate", *argv, run]) == 0
    assert_equal_models(tmp_path / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_share_the_cache(strategy: str, settings: list[str], tmp_path: Path) -> None:
    argv = ["compensate", *settings, "--distillation.cache=true"]
    assert main([*argv, f"--output_dir={tmp_path / 'alone'}"]) == 0
    options = ["--trainer.devices=2", f"--trainer.strategy={strategy}"]
    outcome = run_ranks([*argv, *options, f"--output_dir={tmp_path / 'both'}"], 2)
    assert outcome.codes == [0, 0], outcome.text
    alone, both = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "both")
    assert both["history"]["loss"] == pytest.approx(alone["history"]["loss"], rel=1e-4)


def test_a_mixture_with_text_of_the_dense_model_is_written_once(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "compensate",
        *text_options(compressed, tmp_path),
        "--objective=distill",
        "--distillation.data=text",
        "--distillation.cache=true",
        f"--distillation.cache_dir={tmp_path / 'cache'}",
    ]
    assert main([*argv, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["samples"] == {"train": 8, "validation": 4}
    assert metrics["data"] == "pydoc, qa.jsonl, self"
    assert metrics["data_licence"] is None
    assert metrics["validation_loss"]["after"] < metrics["validation_loss"]["before"]
    written = load_file(tmp_path / "run" / "sampled_text.safetensors")["input_ids"]
    assert written.shape == (3, 24)
    monkeypatch.setattr(teacher, "load_model", refuse_to_load)
    assert main([*argv, f"--output_dir={tmp_path / 'again'}"]) == 0
    assert_equal_models(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distillation.top_k=8"], "top_k is 8, but would be ignored: distillation.cache is f"),
        (
            ["--distillation.cache=true", "--distillation.top_k=300"],
            "distillation.top_k is 300, but the vocabulary has 260 tokens",
        ),
        (
            ["--distillation.cache=true", "--distillation.cache_dir=RUN/cache"],
            "distillation.cache_dir: RUN/cache and output_dir RUN must not be inside each other",
        ),
    ],
)
def test_options_of_the_cache_that_do_not_fit_are_one_line(
    options: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(tmp_path / "run")
    options = [word.replace("RUN", run) for word in options]
    assert main(["compensate", *settings, *options, f"--output_dir={run}"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message.replace("RUN", run) in error
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_text_is_one_line(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "compensate",
        *settings,
        "--distillation.cache=true",
        f"--distillation.cache_dir={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'run'}",
    ]
    assert main([*argv, "--training.max_steps=2"]) == 0
    kept = {file: file.read_bytes() for file in (tmp_path / "cache").glob("*.safetensors")}
    capsys.readouterr()
    assert main([*argv, "--data.num_train=20", "--overwrite"]) == 2
    assert "holds the predictions of another text; use another folder" in capsys.readouterr().err
    assert metrics_of(tmp_path / "run")["steps"] == 2
    assert {file: file.read_bytes() for file in kept} == kept


def test_text_of_the_dense_model_needs_one(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *options, given = text_options(compressed, tmp_path)
    argv = ["compensate", "--objective=text", f"--output_dir={tmp_path / 'run'}", *options]
    assert main(argv) == 2
    assert "text.source self needs distillation.teacher" in capsys.readouterr().err
    assert main([*argv, given]) == 0
