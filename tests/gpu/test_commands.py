"""What only a GPU can show: ``make test-gpu`` runs it, and all other tests with the marker."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.config import ModelConfig
from grasp_lightning.models.loading import load_model
from tests.conftest import save_tiny
from tests.gpu.eight_billion import measured, table
from tests.integration.compensation import compensate_argv

pytestmark = pytest.mark.gpu

TEXT = ["--calibration.source=pydoc", "--calibration.num_samples=6", "--calibration.seqlen=48"]
TEXT += ["--evaluation.source=pydoc", "--evaluation.num_samples=4", "--evaluation.seqlen=48"]
GRASP_PLUS = ["--method.name=grasp_plus", "--method.removed_ratio=0.2"]
METHODS = {
    "grasp_plus": GRASP_PLUS,
    "grasp": ["--method.name=grasp", "--method.num_layers=1", "--method.keep_ratio=0.3"],
    "svd_llm": ["--method.name=low_rank", "--method.preset=svd_llm", "--method.removed_ratio=0.2"],
    "drop": ["--method.name=drop", "--method.num_layers=1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gpu") / "tiny"
    return save_tiny(place, hidden_size=64, intermediate_size=128, max_position_embeddings=256)


def compressed(folder: Path, output: Path, device: str, *keys: str) -> dict:
    """Compress on a device, and return the metrics."""
    where = [f"--model.path={folder}", f"--model.device={device}", f"--output_dir={output}"]
    assert main(["compress", *where, *TEXT, *keys]) == 0
    metrics: dict = json.loads((output / "metrics.json").read_text())
    assert metrics["removed_ratio"] > 0.1
    assert math.isfinite(metrics["perplexity"]["compressed"])
    return metrics


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_the_gpu_equals_one_on_the_cpu(
    method: str, device: str, folder: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / "there", tmp_path / "here"]
    places = zip(runs, (device, "cpu"), strict=True)
    there, here = (compressed(folder, run, place, *METHODS[method]) for run, place in places)
    for key in ("dense", "compressed"):
        assert there["perplexity"][key] == pytest.approx(here["perplexity"][key], rel=1e-3)
    assert there["layers"] == here["layers"]
    assert there["removed_ratio"] == pytest.approx(here["removed_ratio"], abs=1e-3)
    found, expected = (load_file(run / "scores.safetensors") for run in runs)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4 * float(value.max()))


def test_rounded_products_leave_a_plan(device: str, folder: Path, tmp_path: Path) -> None:
    exact, rounded = (
        compressed(folder, tmp_path / x, device, *GRASP_PLUS, f"--trainer.matmul_precision={x}")
        for x in ("highest", "high")
    )
    assert rounded["perplexity"]["compressed"] == pytest.approx(
        exact["perplexity"]["compressed"], rel=0.05
    )


def test_bfloat16_is_close_to_float32(device: str, folder: Path, tmp_path: Path) -> None:
    exact, narrow = (
        compressed(folder, tmp_path / x, device, *GRASP_PLUS, f"--model.dtype={x}")
        for x in ("float32", "bfloat16")
    )
    assert narrow["perplexity"]["compressed"] == pytest.approx(
        exact["perplexity"]["compressed"], rel=0.05
    )


def test_streamed_weights_give_the_plan_of_a_whole_model(
    device: str, folder: Path, tmp_path: Path
) -> None:
    keys = [*GRASP_PLUS, "--statistics.measured_windows=0"]
    for loading in ("whole", "streamed"):
        compressed(folder, tmp_path / loading, device, *keys, f"--model.loading={loading}")
    whole, streamed = ((tmp_path / x / "plan.json").read_bytes() for x in ("whole", "streamed"))
    assert whole == streamed


def test_a_compressed_model_trains_and_writes_text(
    device: str, folder: Path, tmp_path: Path
) -> None:
    compressed(folder, tmp_path / "run", device, *GRASP_PLUS)
    argv = [*compensate_argv(tmp_path / "run/model", tmp_path), f"--model.device={device}"]
    argv += ["--training.max_steps=20"]
    assert main(["compensate", *argv, f"--output_dir={tmp_path / 'trained'}"]) == 0
    metrics = json.loads((tmp_path / "trained/metrics.json").read_text())
    losses = metrics["history"]["loss"]
    assert sum(losses[-5:]) < sum(losses[:5])
    trained = ModelConfig(path=str(tmp_path / "trained/model"), device=device)
    model: Any = load_model(trained).model  # Any: its class is known at run time only
    ids = torch.arange(20, 30, device=device)[None]
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert written.shape == (1, 18)
    assert model(written[:, :-1]).logits.argmax(-1)[0, 9:].tolist() == written[0, 10:].tolist()


def test_an_8b_shaped_model_is_measured(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_layers, windows, seqlen = 4, *((2, 32) if device == "cpu" else (32, 512))
    metrics = measured(
        device, tmp_path / "run", num_layers=num_layers, windows=windows, seqlen=seqlen
    )
    text = table(metrics, num_layers=num_layers, tokens=windows * seqlen)
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")
    assert metrics["removed_ratio"] == pytest.approx(0.05, abs=1e-3)
