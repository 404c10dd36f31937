"""Runs for each target, cut again for another, and a plain folder without the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.plan import Plan
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv

pytestmark = pytest.mark.slow  # every test runs the program several times

TARGETS = ("any", "no_factors", "gguf", "plain")
CHILD = """
import sys

sys.modules["grasp_lightning"] = None  # every import of it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(12)[None]).logits}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model whose MLPs have four widths to choose from, and short texts."""
    folder = tmp_path_factory.mktemp("model")
    source = save_tiny(folder / "tiny", intermediate_size=128, max_position_embeddings=256)
    windows = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=4", "seqlen=32")
    ]
    return [f"--model.path={source}", "--method.removed_ratio=0.2", *windows]


@pytest.fixture(scope="module")
def measured(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that may factorize attention."""
    folder = tmp_path_factory.mktemp("runs") / "any"
    assert main(["compress", *settings, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one width for all MLPs."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    target = "--method.target=plain"
    assert main(["compress", *settings, target, f"--output_dir={folder}"]) == 0
    return folder


def plan_of(run: Path) -> Plan:
    return Plan.from_json((run / "plan.json").read_text())


def test_a_run_is_cut_again_for_any_other_target(
    measured: Path, plain: Path, tmp_path: Path
) -> None:
    for source, target, expected in ((measured, "plain", plain), (plain, "any", measured)):
        argv = ["--from_scores", str(source), f"--method.target={target}"]
        assert main(["compress", *argv, f"--output_dir={tmp_path / target}"]) == 0
        for name in ("plan.json", "factors.safetensors"):
            assert (tmp_path / target / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(("target", "unit"), [("no_factors", 1), ("gguf", 32)])
def test_attention_stays_dense_and_widths_differ(
    target: str, unit: int, measured: Path, tmp_path: Path
) -> None:
    argv = ["--from_scores", str(measured), f"--method.target={target}"]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'cut'}"]) == 0
    plan = plan_of(tmp_path / "cut")
    assert plan.ranks == {}
    assert len({plan.channels.get(name, 128) for name in plan_of(measured).channels}) > 1
    assert all(count % unit == 0 for count in plan.channels.values())
    config = json.loads((tmp_path / "cut" / "model" / "config.json").read_text())
    assert config["quantization_config"]["ranks"] == {}


def test_every_run_predicts_the_loss_of_all_targets(
    measured: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for run, target in ((measured, "any"), (plain, "plain")):
        metrics = json.loads((run / "metrics.json").read_text())
        found[target] = metrics["target_losses"]
        assert found[target].keys() == set(TARGETS)
        own = metrics["loss_change"]["predicted"]
        assert found[target][target] == pytest.approx(own, rel=1e-5)
        assert f"plain {found[target]['plain']:.3f}" in (run / "report.html").read_text()
    assert found["any"] == found["plain"]
    ascending = [found["any"][target] for target in TARGETS]
    assert ascending == sorted(ascending)
    capsys.readouterr()
    assert main(["plan", "--from_scores", str(plain)]) == 0
    losses = ", ".join(f"{target} {found['any'][target]:.3f}" for target in TARGETS)
    assert f"by method.target: {losses}\n" in capsys.readouterr().out


def test_a_plain_folder_opens_without_the_package_and_gives_the_same_logits(
    plain: Path, tmp_path: Path
) -> None:
    folder = plain / "model"
    config = json.loads((folder / "config.json").read_text())
    (width,) = set(plan_of(plain).channels.values())
    assert (config["intermediate_size"], width % 32) == (width, 0)
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert not list(folder.glob("*.py"))
    assert "transformers alone opens it" in (folder / "README.md").read_text()
    output = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", CHILD, str(folder), str(output)], check=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(load_file(output)["logits"], logits)


def test_a_plain_folder_is_evaluated_compressed_and_trained_like_any_model(
    plain: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain / "model"
    words = [f"--model={folder}", "--corpora=pydoc", "--evaluation.num_samples=2"]
    assert main(["evaluate", *words, "--evaluation.seqlen=32"]) == 0
    again = [f"--model.path={folder}", *settings[1:], f"--output_dir={tmp_path / 'again'}"]
    assert main(["compress", *again]) == 0
    argv = [*compensate_argv(folder, tmp_path), f"--output_dir={tmp_path / 'trained'}"]
    assert main(["compensate", *argv]) == 0
    trained = json.loads((tmp_path / "trained" / "model" / "config.json").read_text())
    assert trained["intermediate_size"] == set(plan_of(plain).channels.values()).pop()
    capsys.readouterr()
    assert main(["export", f"--model={folder}", f"--output_dir={tmp_path / 'dense'}"]) == 2
    assert "it is an ordinary checkpoint already" in capsys.readouterr().err
    assert not (tmp_path / "dense").exists()
