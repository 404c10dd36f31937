"""``model.loading: streamed`` gives the plan, scores and weights of a whole model."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.models.streamed_saving import verify_streamed
from tests.conftest import save_tiny
from tests.integration.forked import killed
from tests.integration.killing import Kill

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
# Kills before the third layer's Gram matrices are stored, and while the model is saved.
KILLS = {
    "third layer": Kill("grasp_lightning.storage.moments", "MomentFiles", "save", 3),
    "refit": Kill("grasp_lightning.training.layer_refit", "LayerRefit", "advance", 2),
    "saving": Kill("grasp_lightning.models.streamed_saving", "", "_write_file", 1),
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
    assert main(argv) == 0
    assert main(compress(folder, tmp_path / "whole", "grasp_plus")) == 0

    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method.name=sleb"], "method sleb needs the whole model; expected one of grasp, "),
        (["--method.unit=mlp"], "method.unit measures blocks in the whole model"),
        (["--method.seam=linear"], "set method.seam=none"),
        (["--method.name=grasp", "--method.schedule=iterative"], "set method.schedule=one_shot"),
        (["--method.name=grasp_plus"], "set statistics.measured_windows=0"),
        (["--trainer.strategy=fsdp"], "one process works"),
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


def test_a_damaged_weight_file_is_found_after_saving(tiny_folder: Path) -> None:
    with pytest.raises(Exception, match="the saved weights differ from what was written"):
        verify_streamed(tiny_folder, {"model.norm.weight": "0"})
