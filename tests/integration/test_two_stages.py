"""``compress --compensate``: both stages in one folder, checked beforehand, resumed in either."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

import grasp_lightning
from grasp_lightning.cli import main
from grasp_lightning.errors import ConfigError
from tests.conftest import save_tiny
from tests.integration.compensation import CUT, assert_equal_models, metrics_of
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill

SECOND = """\
output_dir: not-read
train: lora
objective: distill
model: {path: not-read}
text: {source: pydoc, num_samples: 8, num_validation: 2, seqlen: 32}
distillation: {data: text, cache: true, top_k: 8}
training: {batch_size: 4, micro_batch_size: 4}
optimizer: {warmup_steps: 1}
trainer: {checkpoint_seconds: 0}
evaluation: {source: c4}
"""
TRAIN_STEP = Kill(
    "grasp_lightning.training.compensation.module", "CompensationModule", "training_step", 2
)
KILLS = {
    "in the compression": Kill("grasp_lightning.storage.progress", "RunProgress", "add_step", 2),
    "between the stages": Kill("grasp_lightning.commands.two_stages", "", "forget_peak", 1),
    "in the training": TRAIN_STEP,
}


def compression(model: Path) -> list[str]:
    return [f"--model.path={model}", *CUT]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("second") / "second.yaml"
    file.write_text(SECOND)
    return ["compress", *compression(model), f"--compensate={file}", "--compensate.train=all"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*settings, f"--output_dir={folder}"]) == 0
    return folder


def test_the_report_has_a_column_for_each_state(
    whole: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trained, compressed = metrics_of(whole), metrics_of(whole / "compressed")
    first = trained["compression"]
    assert first["perplexity"] == compressed["perplexity"]
    assert first["bytes"] == compressed["bytes"]
    assert first["seconds"] == compressed["seconds"]["total"]
    assert first["parameters"]["compressed"] == trained["parameters"]["after"]
    assert trained["perplexity"]["before"] == pytest.approx(first["perplexity"]["compressed"])
    page, card = ((whole / name).read_text() for name in ("report.html", "model/README.md"))
    for heading in ("Dense", "Compressed", "Compensated", "Against dense"):
        assert f'<th scope="col" class="number">{heading}</th>' in page
    assert "| Dense | Compressed | Compensated | Against dense |" in card
    assert "peak memory" in page
    assert "peak memory" not in card
    capsys.readouterr()
    assert main([*settings, f"--output_dir={whole}"]) == 0  # finished: only printed
    printed = capsys.readouterr().out
    assert "compensated" in printed
    assert f"{whole / 'model'}" in printed


def test_each_stage_is_what_its_own_command_makes(
    whole: Path, model: Path, settings: list[str], tmp_path: Path
) -> None:
    assert main(["compress", *compression(model), f"--output_dir={tmp_path / 'alone'}"]) == 0
    assert_equal_models(tmp_path / "alone", whole / "compressed")
    plans = [
        (folder / "plan.json").read_text() for folder in (tmp_path / "alone", whole / "compressed")
    ]
    assert plans[0] == plans[1]
    file = next(word for word in settings if word.startswith("--compensate=")).partition("=")[2]
    second = [
        f"--config={file}",
        "--train=all",
        f"--model.path={whole / 'compressed' / 'model'}",
        f"--distillation.teacher={model}",
        f"--output_dir={tmp_path / 'again'}",
        *(word for word in compression(model) if word.startswith("--evaluation")),
    ]
    assert main(["compensate", *second]) == 0
    assert_equal_models(tmp_path / "again", whole)


def test_the_dense_model_teaches_layer_by_layer_unless_another_is_named(
    model: Path, tmp_path: Path
) -> None:
    file, run = tmp_path / "local.yaml", tmp_path / "run"
    file.write_text(
        "train: all\nobjective: local\nmodel: {path: not-read}\n"
        "text: {source: pydoc, num_samples: 8, num_validation: 2, seqlen: 32}\n"
        "training: {batch_size: 4, micro_batch_size: 4}\noptimizer: {warmup_steps: 1}\n"
    )
    argv = ["compress", *compression(model), f"--compensate={file}", f"--output_dir={run}"]
    assert main(argv) == 0
    found = metrics_of(run)
    assert found["objective"] == "local"
    assert found["layer_errors"]
    assert found["validation_loss"]["before"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("place", KILLS)
def test_a_killed_command_goes_on_in_the_stage_where_it_was(
    place: str, whole: Path, settings: list[str], tmp_path: Path
) -> None:
    argv = [*settings, f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS[place], signal.SIGKILL, argv) == -signal.SIGKILL
    done = tmp_path / "run" / "compressed" / "metrics.json"
    is_compressed = place != "in the compression"
    assert done.exists() == is_compressed
    before = done.stat().st_mtime_ns if is_compressed else None
    if place == "in the training":  # its files say all that the command said
        folder = tmp_path / "run"
        files = [f"--config={folder}/compressed/config.yaml", f"--compensate={folder}/config.yaml"]
        argv = ["compress", *files, f"--output_dir={folder}", "--overwrite=false"]
    assert main(argv) == 0
    assert_equal_models(tmp_path / "run", whole)
    assert before in (None, done.stat().st_mtime_ns)
    assert metrics_of(tmp_path / "run")["history"] == metrics_of(whole)["history"]


@pytest.mark.slow
def test_two_processes_do_both_stages(whole: Path, settings: list[str], tmp_path: Path) -> None:
    strategies = ["--trainer.strategy=ddp", "--compensate.trainer.strategy=fsdp"]
    argv = [*settings, "--trainer.devices=2", *strategies, f"--output_dir={tmp_path / 'run'}"]
    done = run_ranks(argv, 2)
    assert done.codes == [0, 0], done.text
    left, right = metrics_of(whole), metrics_of(tmp_path / "run")
    assert right["history"]["loss"] == pytest.approx(left["history"]["loss"], rel=1e-4)
    for key in ("perplexity", "validation_loss"):
        assert right[key] == pytest.approx(left[key], rel=1e-4)


@pytest.mark.slow
def test_other_settings_train_the_same_compressed_model_again(
    whole: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    argv, done = [*settings, f"--output_dir={folder}"], folder / "compressed" / "metrics.json"
    before = done.stat().st_mtime_ns
    assert main([*argv, "--compensate.training.epochs=2"]) == 2
    assert "training.epochs is 2 here and 1 in" in capsys.readouterr().err
    assert main([*argv, "--method.keep_ratio=0.3"]) == 2
    assert "method.keep_ratio is 0.3 here and 0.5 in" in capsys.readouterr().err
    for entry in folder.iterdir():  # what a user deletes who keeps only the compression
        if entry.name != "compressed":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert main([*argv, "--compensate.training.epochs=2"]) == 0
    assert done.stat().st_mtime_ns == before
    assert metrics_of(folder)["epochs"] == 2
    assert main([*argv, "--overwrite"]) == 0
    assert done.stat().st_mtime_ns > before
    assert_equal_models(folder, whole)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--compensate.training.epoch=2"], "unknown option --training.epoch; did you mean"),
        (["--compensate.evaluation.source=pydoc"], "compensate.evaluation.source has no effect"),
        (["--compensate.output_dir=x"], "compensate.output_dir has no effect"),
        (["--compensate.train=lora", "--compensate.lora.targets=[nowhere]"], "no linear matches"),
        (["--compensate.distillation.top_k=100000"], "distillation.top_k is 100000, but the"),
        (["--compensate.text.seqlen=4096"], "text.seqlen"),
        (["--compensate.optimizer.warmup_steps=9"], "there are only 2 steps"),
        (["--compensate.trainer.devices=2"], "trainer.devices is 2 here and 1 in the compression"),
        (["--compensate.text.source=file", "--compensate.text.path=nowhere.txt"], "nowhere.txt"),
        (["--compensate.distillation.teacher=./nowhere"], "distillation.teacher"),
        (["--compensate.model.dtype=bfloat16"], "train: all would train weights in"),
        (
            ["--method.name=drop", "--method.keep_ratio=null", "--compensate.train=factors"],
            "train: factors needs low-rank or narrowed linears, and the compression leaves none",
        ),
        (
            [
                *("--method.name=slicegpt", "--method.num_layers=null"),
                *("--compensate.objective=local", "--compensate.distillation.cache=false"),
                "--compensate.distillation.top_k=64",
            ],
            "objective: local compares hidden states, but those of this model are rotated and",
        ),
    ],
)
def test_a_wrong_training_is_refused_before_the_compression(
    options: list[str],
    expected: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*settings, *options, f"--output_dir={tmp_path / 'run'}"]
    for given in ([*argv, "--dry_run"], argv):
        assert main(given) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert expected in line
        assert list(tmp_path.iterdir()) == []


def test_options_of_a_training_need_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", *compression(model), "--compensate.train=all"]
    assert main([*argv, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "--compensate.train has no effect without --compensate FILE" in capsys.readouterr().err


def test_a_dry_run_covers_both_stages(
    whole: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*settings, "--dry_run", "--compensate.text.source=[pydoc,self]"]
    assert main([*argv, f"--output_dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "train: all, " in out
    assert "the teacher's cache on disk: " in out
    assert out.rstrip().endswith("Not checked: the values of the weights; the text of self.")
    assert list(tmp_path.iterdir()) == []
    assert main([*settings, "--dry_run", f"--output_dir={whole}"]) == 0
    assert "contains the finished run" in capsys.readouterr().out


def test_python_takes_a_model_in_memory_and_keywords(model: Path, tmp_path: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(model)
    text = {"source": "pydoc", "num_samples": 4, "seqlen": 32}
    keywords: dict[str, Any] = {
        "train": "factors",
        "objective": "text",
        "text": {**text, "num_validation": 0},
        "training": {"batch_size": 2},
        "optimizer": {"warmup_steps": 0},
    }
    arguments: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(model),
        "method": "grasp",
        "num_layers": 1,
        "keep_ratio": 0.5,
        "calibration": text,
        "evaluation": text,
        "output_dir": tmp_path / "run",
    }
    run = grasp_lightning.compress(loaded, compensate=keywords, **arguments)
    assert run.metrics["train"] == "factors"
    assert run.metrics["compression"]["method"] == "grasp"
    assert run.model.num_parameters() == run.metrics["parameters"]["after"]
    assert grasp_lightning.load(run.folder / "compressed").metrics["method"] == "grasp"
    with pytest.raises(ConfigError, match=r"needs distillation\.teacher"):
        grasp_lightning.compress(
            loaded, compensate={**keywords, "objective": "distill"}, **arguments
        )
