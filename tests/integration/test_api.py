"""The Python interface does what the program does."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from grasp_lightning import Run, compensate, compress, evaluate, load
from grasp_lightning.cli import main
from grasp_lightning.commands import compress as command
from grasp_lightning.errors import ConfigError, GraspError, ModelError, OutputError
from grasp_lightning.models.integrity import model_hash
from tests.conftest import byte_tokenizer, save_tiny, tiny_model

TEXTS: dict[str, Any] = {
    "calibration": {"source": "pydoc", "num_samples": 4, "seqlen": 32},
    "evaluation": {"source": "pydoc", "num_samples": 2, "seqlen": 32},
}
FLAGS = [f"--{name}.{key}={value}" for name, keys in TEXTS.items() for key, value in keys.items()]
KEYS: dict[str, Any] = {"method": "grasp", "num_layers": 1, "keep_ratio": 0.3, **TEXTS}
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="module")
def run(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return compress(dense, output_dir=tmp_path_factory.mktemp("runs") / "run", **KEYS)


@pytest.mark.slow
def test_a_call_does_what_the_command_does(run: Run, dense: Path, tmp_path: Path) -> None:
    argv = [f"--model.path={dense}", f"--output_dir={tmp_path / 'run'}", "--method.name=grasp"]
    argv += ["--method.num_layers=1", "--method.keep_ratio=0.3", *FLAGS]
    assert main(["compress", *argv]) == 0
    for name in ("plan.json", "scores.safetensors", "model/model.safetensors"):
        assert (run.folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    # The configuration is the same, so each of the two reads the run of the other.
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    same = compress(str(dense), output_dir=tmp_path / "run", **KEYS)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert same.metrics == json.loads(before)


def test_a_finished_run_is_loaded_when_needed(run: Run) -> None:
    found = load(str(run.folder))
    assert found == run
    assert found.report.is_file()
    assert found.metrics["layers"] == run.metrics["layers"]
    expected = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert torch.equal(found.model(IDS).logits, expected(IDS).logits)
    assert found.model is found.model
    assert not found.model.training
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    assert parameters == run.metrics["parameters"]["compressed"]
    assert found.tokenizer("a word")["input_ids"] == byte_tokenizer()("a word")["input_ids"]


def test_a_model_object_is_compressed_as_a_copy(run: Run, dense: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    model.train()
    before, tokenizer = model_hash(model), byte_tokenizer()

    mine = compress(model, tokenizer=tokenizer, output_dir=tmp_path / "mine", **KEYS)

    assert (model_hash(model), model.training) == (before, True)
    assert (mine.folder / "plan.json").read_bytes() == (run.folder / "plan.json").read_bytes()
    assert torch.equal(mine.model(IDS).logits, run.model(IDS).logits)
    assert mine.metrics["model"] == "tiny"
    for file in mine.model_folder.rglob("*"):
        assert str(dense.parent).encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_run_is_found_by_the_content_of_its_model(tmp_path: Path) -> None:
    first = compress(tiny_model(), tokenizer=byte_tokenizer(), output_dir=tmp_path / "a", **KEYS)
    assert first.metrics["model"] == "LlamaForCausalLM"
    written = (first.folder / "plan.json").stat().st_mtime_ns
    again = compress(tiny_model(), tokenizer=byte_tokenizer(), output_dir=tmp_path / "a", **KEYS)
    assert (again.folder / "plan.json").stat().st_mtime_ns == written
    different = tiny_model()
    different.config.rms_norm_eps = 1e-3  # the same weights compute something else
    for other in (tiny_model(seed=1), different):
        with pytest.raises(OutputError, match=r"a different configuration: model\.path is"):
            compress(other, tokenizer=byte_tokenizer(), output_dir=tmp_path / "a", **KEYS)


class OwnLlama(LlamaForCausalLM):
    """A class that no other process knows."""


LLAMA = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=260)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LlamaModel(LLAMA), "the model is a LlamaModel; expected LlamaForCausalLM"),
        (OwnLlama(LLAMA), "the model is a OwnLlama; expected LlamaForCausalLM"),
        (
            LlamaForCausalLM(LLAMA).to_empty(device="meta"),
            "the model is on meta; move it to one device",
        ),
        (torch.nn.Linear(2, 2), "model: expected a path, .* got Linear"),
    ],
)
def test_a_model_object_that_cannot_be_saved_is_refused(
    model: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GraspError, match=message):
        compress(model, tokenizer=byte_tokenizer(), output_dir=tmp_path / "x", **KEYS)
    assert not (tmp_path / "x").exists()


def test_a_changed_architecture_is_refused(tmp_path: Path) -> None:
    model: Any = tiny_model()
    del model.model.layers[3]
    with pytest.raises(ModelError, match=r"another model: model\.layers\.3"):
        compress(model, tokenizer=byte_tokenizer(), output_dir=tmp_path / "x", **KEYS)


def test_a_tokenizer_belongs_to_a_model_object(dense: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: expected .* got NoneType"):
        compress(tiny_model(), **KEYS)
    with pytest.raises(ConfigError, match="tokenizer has no effect with a path or name"):
        compress(dense, tokenizer=byte_tokenizer(), **KEYS)


@pytest.mark.parametrize("call", [compress, compensate, evaluate])
def test_an_unknown_keyword_is_told_as_the_program_tells_it(
    call: Callable[..., object], dense: Path
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{call.__name__}: unknown key seeds; did you mean seed"
    ):
        call(dense, seeds=3)


@pytest.mark.parametrize("call", [evaluate, partial(evaluate, model=["a"])])
def test_models_to_evaluate_are_positional(call: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="give models as positional arguments"):
        call()


def test_several_processes_need_a_launcher(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start that many with torchrun or srun"):
        compress(dense, output_dir=tmp_path / "x", trainer={"devices": 2}, **KEYS)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_a_script(run: Run, dense: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    keys = {**KEYS, "output_dir": str(tmp_path / "two"), "trainer": {"devices": 2}}
    script.write_text(
        "from grasp_lightning import compress\n"
        f"run = compress({str(dense)!r}, **{keys!r})\n"
        "print(run.metrics['layers'], run.model.training)\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{run.metrics['layers']} False") == 2
    assert (tmp_path / "two" / "plan.json").read_bytes() == (run.folder / "plan.json").read_bytes()


def test_what_is_no_finished_run_is_not_loaded(run: Run, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        load(tmp_path / "absent")
    for folder in (tmp_path, run.model_folder):
        with pytest.raises(OutputError, match=r"contains no run of compress .* its output_dir$"):
            load(folder)
    argv = [f"--model={run.model_folder}", f"--output_dir={tmp_path / 'dense'}"]
    assert main(["export", *argv]) == 0
    with pytest.raises(OutputError, match="contains no run of compress or compensate"):
        load(tmp_path / "dense")


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_the_same_call_resumes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_outputs", interrupt)
        with pytest.raises(KeyboardInterrupt, match="it resumes from what was saved"):
            compress(dense, output_dir=tmp_path / "run", **KEYS)
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(OutputError, match="is not finished; run it again to resume it"):
        load(tmp_path / "run")
    assert compress(dense, output_dir=tmp_path / "run", **KEYS).metrics["layers"]


@pytest.mark.slow
def test_a_run_is_compensated_and_evaluated(
    run: Run, dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = list(logging.getLogger().handlers)
    trained = compensate(
        run,
        output_dir=tmp_path / "trained",
        objective="text",
        text={"source": "pydoc", "num_samples": 8, "num_validation": 2, "seqlen": 32},
        training={"batch_size": 4},
        optimizer={"warmup_steps": 1},
        evaluation=TEXTS["evaluation"],
    )
    assert isinstance(trained, Run)
    assert trained.metrics["train"] == "lora"
    first, second = evaluate(
        dense,
        trained,
        corpora="pydoc",
        evaluation={"num_samples": 2, "seqlen": 32},
        output=tmp_path / "results.json",
    )
    assert first["model"] == str(dense)
    assert second["cost"]["parameters"] == run.metrics["parameters"]["compressed"]
    perplexity = second["corpora"]["pydoc"]["perplexity"]
    assert perplexity == pytest.approx(trained.metrics["perplexity"]["after"], rel=1e-4)
    assert trained.metrics["evaluation"]["corpora"]["pydoc"]["perplexity"] == perplexity
    assert len(json.loads((tmp_path / "results.json").read_text())["models"]) == 2
    assert logging.getLogger().handlers == handlers
    assert "GPU available" not in caplog.text


def test_importing_the_functions_and_a_mistyped_key_load_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from grasp_lightning import Run, compensate, compress, evaluate, load\n"
        "heavy = {'torch', 'transformers', 'lightning', 'jsonargparse', 'numpy', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "try:\n"
        "    compress('smollm2', remove_ratio=0.2)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    told, loaded = done.stdout.splitlines()
    assert told.startswith("compress: unknown key remove_ratio; did you mean removed_ratio?")
    assert loaded == "[]"
