"""The greedy search of layers and blocks through the program: report and folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.methods.removal import search_losses
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Plan
from grasp_lightning.reporting.tables import indices_text
from tests.conftest import save_tiny

pytestmark = pytest.mark.slow  # every test runs the program several times

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = save_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=6)
    texts = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=5", "seqlen=32", "batch_size=2")
    ]
    method = ["--method.name=sleb", "--method.num_layers=3", "--trainer.checkpoint_seconds=0"]
    return [f"--model.path={source}", *method, *texts]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(["compress", *settings, f"--output_dir={run}"]) == 0
    return run


def plan_of(run: Path) -> Plan:
    return Plan.from_json((run / "plan.json").read_text())


def test_the_result_is_an_ordinary_model_with_a_report(settings: list[str], whole: Path) -> None:
    plan = plan_of(whole)
    order = [op.layers[0] for op in plan.operations if isinstance(op, DropLayers)]
    assert len(order) == len(plan.operations) == 3
    assert plan.options == {"num_layers": 3}
    steps = search_losses(load_file(whole / "scores.safetensors"))
    assert len(steps) == 3
    for number, losses in enumerate(steps):
        assert min(losses, key=lambda index: losses[index]) == order[number]
        assert sorted({*range(6)} - {*losses}) == sorted([0, *order[:number], 5])
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["layers"] == sorted(order)
    assert metrics["seconds"]["removals"] > 0
    told = ", ".join(map(str, order))
    assert f"deletes layers {told}, in this order" in (whole / "report.html").read_text()
    card = (whole / "model" / "README.md").read_text()
    assert f"decoder layers {indices_text(sorted(order))} are deleted" in card

    config = json.loads((whole / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], "auto_map" in config) == (3, False)
    saved = AutoModelForCausalLM.from_pretrained(whole / "model")
    model = AutoModelForCausalLM.from_pretrained(settings[0].partition("=")[2])
    apply_operations(DecoderView(model), plan.operations, {})
    assert torch.equal(saved(IDS).logits, model(IDS).logits)


def test_plan_predicts_the_size(
    settings: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings]) == 0
    told = capsys.readouterr().out
    parameters = json.loads((whole / "metrics.json").read_text())["parameters"]["compressed"]
    assert f"parameters removed: {parameters:,} remain" in told
    assert "3 layers are deleted" in told


def test_other_scores_cannot_replace_the_search(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grasp = [word for word in settings if not word.startswith("--method.name")]
    argv = ["--method.name=grasp", f"--output_dir={tmp_path / 'scores'}"]
    assert main(["compress", *grasp, *argv]) == 0
    capsys.readouterr()
    again = [f"--from_scores={tmp_path / 'scores'}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["compress", *again, "--method.name=sleb", "--method.num_layers=3"]) == 2
    assert "needs the loss without each layer, which no run stores" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_blocks_are_removed_and_reported(settings: list[str], tmp_path: Path) -> None:
    own = [word for word in settings if not word.startswith("--method.")]
    unit = ["--method.name=drop", "--method.unit=attention", "--method.num_layers=2"]
    run = tmp_path / "run"
    assert main(["compress", *own, *unit, f"--output_dir={run}"]) == 0
    plan = plan_of(run)
    assert plan.options == {"unit": "attention", "num_layers": 2}
    layers = indices_text(plan.selected_layers or ())
    told = (run / "model" / "README.md").read_text()
    assert f"the attention of layers {layers}. In total" in told
    assert "Removed entirely: 2 layers or blocks" in (run / "report.html").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert loaded.num_parameters() == metrics["parameters"]["compressed"]
