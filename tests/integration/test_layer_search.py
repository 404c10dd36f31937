"""The greedy search of layers through the program: kills, processes, report and folder."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Plan
from grasp_lightning.reporting.tables import indices_text
from tests.conftest import save_tiny
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill

pytestmark = pytest.mark.slow  # every test runs the program several times

IDS = torch.arange(12)[None]
# Three batches per step: in the second batch of the second step, and before the second deletion.
KILLS = {
    "batch": Kill("grasp_lightning.training.calibration", "CalibrationModule", "predict_step", 5),
    "deletion": Kill("grasp_lightning.pipeline", "", "apply_operations", 2),
}


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
    losses = load_file(whole / "scores.safetensors")
    for number, index in enumerate(order):
        values = losses[f"search.{number}.losses"]
        assert values.nan_to_num(torch.inf).argmin() == index
        assert values.isnan().nonzero().flatten().tolist() == sorted([0, *order[:number], 5])
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


@pytest.mark.parametrize("place", KILLS)
def test_a_killed_search_resumes(
    place: str, settings: list[str], whole: Path, tmp_path: Path
) -> None:
    argv = ["compress", *settings, f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS[place], signal.SIGKILL, argv) == -signal.SIGKILL
    assert main(argv) == 0
    for name in ("plan.json", "scores.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_find_what_one_finds(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    argv = ["compress", *settings, "--trainer.devices=2", f"--output_dir={tmp_path / 'run'}"]
    done = run_ranks(argv, 2)
    assert done.codes == [0, 0], done.text
    assert (tmp_path / "run" / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


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
    again = ["compress", *own, *unit, f"--output_dir={tmp_path / 'again'}"]
    cut = Kill("grasp_lightning.pipeline", "", "apply_operations", 1)
    assert killed(cut, signal.SIGKILL, again) == -signal.SIGKILL
    assert main(again) == 0
    assert (tmp_path / "again" / "plan.json").read_bytes() == (run / "plan.json").read_bytes()
