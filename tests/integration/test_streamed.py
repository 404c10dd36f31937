"""``model.loading: streamed`` gives the plan, scores and weights of a whole model."""

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.commands.streamed import check_streamed
from grasp_lightning.config import CompressConfig, MethodConfig, ModelConfig, TrainerConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.models.formats.dense import densify
from grasp_lightning.models.loading import load_model
from grasp_lightning.models.streamed_saving import verify_streamed
from grasp_lightning.storage import model_folder
from grasp_lightning.storage.progress import RunProgress
from grasp_lightning.training.layer_refit import LayerRefit
from grasp_lightning.training.sweep import LayerSweep
from tests.conftest import save_tiny
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill
from tests.unit.evaluation.test_harness import questions

SETTINGS = [
    "--calibration.source=pydoc",
    "--calibration.num_samples=5",
    "--calibration.seqlen=32",
    "--calibration.batch_size=2",
    "--evaluation.source=pydoc",
    "--evaluation.num_samples=3",
    "--evaluation.seqlen=32",
    "--statistics.measured_windows=0",
]
METHODS = {
    "angular": ["drop", "--method.num_layers=2", "--method.layer_metric=angular"],
    "grasp": ["grasp", "--method.num_layers=2", "--method.score_all_layers=true"],
    "svd_llm_update": ["low_rank", "--method.preset=svd_llm_update", "--method.layers=[1,3]"],
    "fwsvd": ["low_rank", "--method.preset=fwsvd", "--method.keep_ratio=0.6"],
    "grasp_plus": ["grasp_plus", "--method.removed_ratio=0.3"],
}
# Kills before the third layer's Gram matrices are stored, and up to the check of the saved model.
KILLS = {
    "third layer": Kill("grasp_lightning.storage.moments", "MomentFiles", "save", 3),
    "decision": Kill("grasp_lightning.storage.linear_files", "LinearFiles", "save", 9),
    "refit": Kill("grasp_lightning.training.layer_refit", "LayerRefit", "advance", 2),
    "saving": Kill("grasp_lightning.models.streamed_saving", "", "_write_file", 1),
    "verification": Kill("grasp_lightning.storage.model_folder", "", "verify_streamed", 1),
}


def compress(folder: Path, output: Path, method: str, *more: str) -> list[str]:
    name, *keys = METHODS[method]
    paths = [f"--model.path={folder}", f"--output_dir={output}", f"--method.name={name}"]
    return ["compress", *SETTINGS, *paths, *keys, *more]


def assert_equal_runs(first: Path, second: Path) -> None:
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    names = ["scores.safetensors", "factors.safetensors", "model/model.safetensors"]
    for name in names:
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            left, right = load_file(first / name), load_file(second / name)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
    metrics = [json.loads((x / "metrics.json").read_text()) for x in (first, second)]
    perplexities = [content["perplexity"] for content in metrics]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)
    files = [sorted(file.name for file in (x / "model").iterdir()) for x in (first, second)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family"), [*((method, "llama") for method in METHODS), ("grasp_plus", "gpt2")]
)
def test_a_streamed_run_equals_a_whole_one(method: str, family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    # All hidden states are in files.
    more = ["--model.loading=streamed", "--statistics.max_memory=1e-6"]

    assert main(compress(folder, tmp_path / "whole", method)) == 0
    assert main(compress(folder, tmp_path / "streamed", method, *more)) == 0

    assert_equal_runs(tmp_path / "whole", tmp_path / "streamed")


@pytest.mark.slow
def test_a_killed_streamed_run_resumes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    argv = compress(folder, tmp_path / "run", "grasp_plus", "--model.loading=streamed")

    for kill in KILLS.values():
        assert killed(kill, signal.SIGKILL, argv) == -signal.SIGKILL
    written = (tmp_path / "run" / "checkpoints" / "model.safetensors").stat()
    assert main(argv) == 0
    kept = (tmp_path / "run" / "model" / "model.safetensors").stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert main(compress(folder, tmp_path / "whole", "grasp_plus")) == 0

    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["angular", "grasp", "grasp_plus"])
def test_several_processes_share_the_windows_and_decide_as_one(method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    more = ["--model.loading=streamed", "--statistics.max_memory=1e-6"]
    assert main(compress(folder, tmp_path / "alone", method, *more)) == 0
    # Five windows and three held-out ones: the processes have unequal shares.
    argv = compress(folder, tmp_path / "run", method, *more, "--trainer.devices=2")

    if method == "grasp_plus":  # the rest runs in one process
        kills = [KILLS["third layer"], KILLS["decision"]._replace(call=5), KILLS["refit"]]
        for kill in kills:
            assert run_ranks(argv, 2, kill).codes == [-signal.SIGKILL] * 2
        assert main(compress(folder, tmp_path / "run", method, *more)) == 0
    else:
        done = run_ranks(argv, 2)
        assert done.codes == [0, 0], done.text
        assert done.text.count("model:  ") == 1

    assert_close_runs(tmp_path / "alone", tmp_path / "run")


def assert_close_runs(first: Path, second: Path) -> None:
    """Decisions are the same, and scores and weights close."""
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    for name, rtol in (("scores.safetensors", 1e-5), ("model/model.safetensors", 1e-3)):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            left, right = load_file(first / name), load_file(second / name)
            assert left.keys() == right.keys()
            for key, values in left.items():
                scale = float(values.abs().max())
                torch.testing.assert_close(right[key], values, rtol=rtol, atol=rtol * scale)
    metrics = [json.loads((x / "metrics.json").read_text()) for x in (first, second)]
    perplexities = [content["perplexity"]["compressed"] for content in metrics]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
    assert not (second / "checkpoints").exists()


@pytest.mark.slow
def test_memory_holds_a_few_layers_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=10)
    seen: dict[str, int] = {}
    earlier = live_storages()  # of other tests; they stay alive during this one
    watched = (
        (LayerRefit, "advance"),
        (RunProgress, "add_step"),
        (model_folder, "verify_streamed"),
    )
    for owner, name in watched:
        monkeypatch.setattr(owner, name, watching(owner, name, seen, earlier))

    argv = compress(folder, tmp_path / "run", "grasp_plus", "--model.loading=streamed")
    assert main([*argv, "--statistics.max_memory=1e-6"]) == 0

    (weights,) = folder.glob("*.safetensors")
    shapes = load_file(weights)
    layer = sum(v.nbytes for key, v in shapes.items() if ".layers.0." in key)
    outside = sum(v.nbytes for key, v in shapes.items() if ".layers." not in key)
    assert seen.keys() == {name for _, name in watched}
    # Two layers, one of them with its factors, and what its refit sums up.
    assert max(seen.values()) < outside + 6 * layer < sum(v.nbytes for v in shapes.values())


def watching(
    owner: object, name: str, seen: dict[str, int], earlier: Mapping[int, torch.UntypedStorage]
) -> Callable[..., object]:
    """Return a function of a class or module that first notes the bytes of all new tensors."""
    original = getattr(owner, name)

    def watched(*args: object, **kwargs: object) -> object:
        found = live_storages()
        live = sum(found[key].nbytes() for key in found.keys() - earlier.keys())
        seen[name] = max(seen.get(name, 0), live)
        return original(*args, **kwargs)

    return watched


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Return the memory of all tensors that exist in this process, by address."""
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in found}


@pytest.mark.slow
def test_a_compressed_model_is_evaluated_and_exported_layer_by_layer(tmp_path: Path) -> None:
    folder, run, task_data = save_tiny(tmp_path / "tiny"), tmp_path / "run", tmp_path / "data"
    (task_data / "openbookqa").mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in questions())
    (task_data / "openbookqa" / "test.jsonl").write_text(rows)
    assert main(compress(folder, run, "grasp_plus", "--model.loading=streamed")) == 0
    found: list[dict[str, Any]] = []
    for loading in ("whole", "streamed"):
        argv = [f"--model={folder}", f"--model={run / 'model'}", f"--loading={loading}"]
        argv += ["--corpora=pydoc", "--evaluation.num_samples=3", "--evaluation.seqlen=32"]
        argv += ["--tasks=openbookqa", f"--task_data={task_data}", "--batch_size=3"]
        output = tmp_path / f"{loading}.json"
        assert main(["evaluate", *argv, f"--output={output}"]) == 0
        found.append(json.loads(output.read_text()))
    export = ["export", f"--model={run / 'model'}", "--loading=streamed"]
    assert main([*export, f"--output_dir={tmp_path / 'dense'}"]) == 0

    for whole, streamed in zip(*(content["models"] for content in found), strict=True):
        assert streamed["cost"] == whole["cost"]
        assert streamed["sha256"] == whole["sha256"]
        (first,), (second,) = whole["corpora"].values(), streamed["corpora"].values()
        assert second["perplexity"] == pytest.approx(first["perplexity"], rel=1e-6)
        tasks = [x["tasks"]["openbookqa"]["results"]["openbookqa"] for x in (whole, streamed)]
        assert tasks[0]["samples"] == tasks[1]["samples"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "model")
    assert not hasattr(exported.config, "auto_map")
    dense = load_model(ModelConfig(path=str(run / "model"), device="cpu")).model
    densify(dense)
    left, right = exported.state_dict(), dense.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_resumes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", vocab_size=4000)
    more = ["--method.removed_ratio=0.05", "--model.loading=streamed"]
    argv = compress(folder, tmp_path / "run", "grasp_plus", *more)
    # The embedding does not fit into a file, statistics and factors do.
    code, text = in_process(argv, max_file_bytes=500_000)
    assert code == 2
    assert "cannot write" in text
    assert "File too large" in text
    assert len(text.strip().splitlines()[-1]) < 400
    assert (tmp_path / "run" / "checkpoints").exists()

    before = sorted((tmp_path / "run").glob("statistics*"))
    times = [file.stat().st_mtime_ns for file in before]
    assert main(argv) == 0
    assert times == [file.stat().st_mtime_ns for file in before]


def in_process(argv: list[str], *, max_file_bytes: int) -> tuple[int, str]:
    """Run a command in a fresh process whose files are limited; return its code and errors."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({max_file_bytes},) * 2); "
    program = limit + f"from grasp_lightning.cli import main; raise SystemExit(main({argv!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method.name=sleb"], "method sleb needs the whole model; expected one of grasp, "),
        (["--method.unit=mlp"], "method.unit measures blocks in the whole model"),
        (["--method.seam=linear"], "set method.seam=none"),
        (["--method.name=grasp", "--method.schedule=iterative"], "set method.schedule=one_shot"),
        (["--method.name=grasp_plus"], "set statistics.measured_windows=0"),
        (["--trainer.strategy=fsdp"], "set trainer.strategy=auto"),
        (["--trainer.precision=bf16-mixed"], "set trainer.precision=32-true"),
        (["--calibration.source=self"], "leave self out of calibration.source"),
        (["--statistics.shared=shared"], "leave statistics.shared unset"),
        (["--model.path=smollm2"], "a GGUF file is converted as a whole"),
    ],
)
def test_what_needs_the_whole_model_is_refused_in_one_line(
    more: list[str],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = [f"--model.path={tiny_folder}", "--method.name=drop", "--method.num_layers=1"]
    base += ["--calibration.source=pydoc", "--model.loading=streamed"]

    assert main(["compress", *base, f"--output_dir={tmp_path / 'run'}", *more]) == 2

    text = " ".join(capsys.readouterr().err.split())
    assert "model.loading is streamed, but" in text
    assert message in text
    assert not (tmp_path / "run").exists()


def test_processes_of_several_nodes_are_refused_in_one_line(tiny_folder: Path) -> None:
    config = CompressConfig(
        model=ModelConfig(path=str(tiny_folder), loading="streamed"),
        method=MethodConfig(name="drop", num_layers=1),
        trainer=TrainerConfig(devices=2, num_nodes=2),
    )
    with pytest.raises(ConfigError, match=r"set trainer\.num_nodes=1; or set model\.loading=whole"):
        check_streamed(config)


def test_the_plan_shows_memory_of_device_host_and_disk(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", f"--model.path={tiny_folder}", "--method.name=grasp", "--method.num_layers=2"]

    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "\n  streamed " in text
    assert "streamed (model.loading=streamed): also" in text

    assert main([*argv, "--method.schedule=iterative"]) == 0
    assert "streamed" not in capsys.readouterr().out


def test_the_plan_counts_what_all_processes_read(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", f"--model.path={tiny_folder}", "--method.name=grasp", "--method.num_layers=2"]
    argv += ["--statistics.max_memory=1e-6", "--trainer.precision=32-true"]
    found: list[tuple[float, float]] = []
    for number in (1, 2):
        assert main([*argv, f"--trainer.devices={number}"]) == 0
        text = capsys.readouterr().out
        numbers = re.search(r"([\d.]+) MB of\s+temporary files.*about ([\d.]+) MB", text, re.DOTALL)
        assert numbers is not None
        found.append((float(numbers[1]), float(numbers[2])))
    (disk, read), (disk_of_two, read_of_two) = found
    assert disk_of_two == pytest.approx(disk, abs=0.02)
    assert read_of_two == pytest.approx(2 * read, abs=0.02)


def test_too_little_disk_is_found_before_the_first_sweep(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(LayerSweep, "up", None)  # calling it would fail
    argv = compress(tiny_folder, tmp_path / "run", "grasp_plus", "--model.loading=streamed")

    assert main(argv) == 2

    assert re.search(r"needs [\d.]+ MB, but 0.1 MB are free", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device_memory", "choice"),
    [
        (1.0, "take whole (model.loading=whole)"),
        (0.0009, "take streamed (model.loading=streamed)"),
        (0.0001, "nothing fits, least needs"),
    ],
)
def test_the_plan_says_how_to_load_a_model_on_a_device(
    device_memory: float, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=24)
    argv = ["plan", f"--model.path={folder}", "--method.name=drop", "--method.num_layers=2"]

    assert main([*argv, f"--device_memory={device_memory}"]) == 0

    text = capsys.readouterr().out
    assert "whole needs " in text
    assert choice in text


def test_a_damaged_weight_file_is_found_after_saving(tiny_folder: Path) -> None:
    with pytest.raises(Exception, match="the saved weights differ from what was written"):
        verify_streamed(tiny_folder, {"model.norm.weight": "0"})
