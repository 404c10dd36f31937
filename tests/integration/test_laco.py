"""Layer collapse from ``compress`` to an ordinary model folder, however often it is killed."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.config import MethodConfig
from grasp_lightning.methods import resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import MergeLayers, Plan, TryMerge
from grasp_lightning.training.merge_trials import MergeTrials
from tests.conftest import save_tiny
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill

pytestmark = pytest.mark.slow  # every test runs the program several times

GRASP = MethodConfig(name="grasp", num_layers=1)
SIXTH_TRIAL = Kill("grasp_lightning.training.merge_trials", "MergeTrials", "_own_sums", 6)


def trials_of(file: Path) -> list[TryMerge]:
    """Return the trials in a plan; none if the file does not exist."""
    if not file.exists():
        return []
    operations = Plan.from_json(file.read_text()).operations
    return [op for op in operations if isinstance(op, TryMerge)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = save_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2", num_hidden_layers=6)
    return [
        f"--model.path={model}",
        *("--method.name=laco", "--method.num_layers=4", "--method.merge_layers=3"),
        *("--calibration.source=pydoc", "--calibration.num_samples=4", "--calibration.seqlen=32"),
        *("--evaluation.source=pydoc", "--evaluation.num_samples=2", "--evaluation.seqlen=32"),
        "--statistics.priced_windows=3",
    ]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["compress", *settings, f"--output_dir={folder}"]) == 0
    return folder


def assert_equal_runs(first: Path, second: Path) -> None:
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    for name in ("scores.safetensors", "model/model.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert not (second / "checkpoints").exists()


def test_the_run_tells_what_was_tried_and_merged(whole: Path) -> None:
    plan = Plan.from_json((whole / "plan.json").read_text())
    merges = [op for op in plan.operations if isinstance(op, MergeLayers)]
    trials = trials_of(whole / "plan.json")
    assert len(plan.dropped_layers) == 4
    assert len(merges) == 2
    assert any(trial.sweep for trial in trials)  # a lower threshold was needed
    scores = load_file(whole / "scores.safetensors")
    assert len(scores) == len(trials)
    assert all(key.endswith(".similarity") and -1 <= scores[key] <= 1 for key in scores)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["seconds"]["merges"] > 0
    base, absorbed = [*plan.merged_layers.items()][-1]
    assert metrics["layer_changes"][str(base)]["mlp"] == {"changed": 3, "total": 3}
    assert metrics["layer_changes"][str(absorbed[-1])] is None
    card = (whole / "model" / "README.md").read_text()
    assert f"into layer {base}" in card
    assert "This is an ordinary model with fewer layers" in card
    report = (whole / "report.html").read_text()
    assert "Search for merges: 2 of " in report
    number = len(metrics["layer_changes"])
    assert f"{number} decoder layers merged into {len(plan.merged_layers)}, " in report


def test_a_killed_search_repeats_no_trial(settings: list[str], whole: Path, tmp_path: Path) -> None:
    argv = ["compress", *settings, f"--output_dir={tmp_path / 'run'}"]
    assert killed(SIXTH_TRIAL, signal.SIGKILL, argv) == -signal.SIGKILL
    before = len(trials_of(tmp_path / "run" / "checkpoints" / "steps.json"))
    tried = []
    with pytest.MonkeyPatch.context() as patch:

        def noting(self: MergeTrials, view: DecoderView, operation: MergeLayers) -> float:
            tried.append(operation)
            return try_merge(self, view, operation)

        try_merge = MergeTrials.__call__
        patch.setattr(MergeTrials, "__call__", noting)
        assert main(argv) == 0
    assert_equal_runs(whole, tmp_path / "run")
    assert before + len(tried) == len(trials_of(whole / "plan.json"))


def test_two_processes_that_share_the_model_merge_as_one_does(
    settings: list[str], tmp_path: Path
) -> None:
    words = ["compress", *settings, "--method.merge=released"]
    assert main([*words, f"--output_dir={tmp_path / 'whole'}"]) == 0
    shared = ["--trainer.strategy=fsdp", "--trainer.devices=2"]
    done = run_ranks([*words, *shared, f"--output_dir={tmp_path / 'run'}"], 2)
    assert done.codes == [0, 0], done.text
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_scores_of_another_run_are_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "grasp"
    words = [word for word in settings if not word.startswith("--method")]
    chosen = ["--method.name=grasp", "--method.num_layers=1"]
    assert main(["compress", *words, *chosen, f"--output_dir={first}"]) == 0
    capsys.readouterr()
    argv = [f"--from_scores={first}", f"--output_dir={tmp_path / 'no'}", "--method.name=laco"]
    keys = [key for key, value in vars(resolve_method(GRASP)).items() if value is not None]
    unset = [f"--method.{key}=null" for key in keys if key != "name"]
    assert main(["compress", *argv, *unset, "--method.removed_ratio=0.2"]) == 2
    assert "this method tries merges of layers on the calibration text" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
