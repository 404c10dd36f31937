"""Methods that truncate in a measured metric, through the program: budget, passes, second cuts."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.forked import killed
from tests.integration.killing import Kill

pytestmark = pytest.mark.slow  # every test runs the program several times

PRESETS = ("svd_llm", "svd_llm_update", "svd_llm_v2", "asvd", "fwsvd")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--calibration.source=pydoc",
        "--calibration.num_samples=5",
        "--calibration.seqlen=48",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=48",
    ]


@pytest.fixture(scope="module")
def cut(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of grasp_plus at 0.2."""
    folder = tmp_path_factory.mktemp("runs") / "cut"
    assert main(["compress", *settings, *plus(0.2), f"--output_dir={folder}"]) == 0
    return folder


def plus(removed_ratio: float) -> list[str]:
    return ["--method.name=grasp_plus", f"--method.removed_ratio={removed_ratio}"]


def read(folder: Path, name: str) -> dict:
    content: dict = json.loads((folder / name).read_text())
    return content


def test_the_budget_is_spent_over_all_layers(cut: Path) -> None:
    metrics, plan = read(cut, "metrics.json"), read(cut, "plan.json")
    # One rank of the smallest linear, where the model is tiny.
    unit = (32 + 16) / metrics["parameters"]["dense"]
    assert 0.2 <= metrics["removed_ratio"] <= 0.2 + unit
    assert plan["method"] == "grasp_plus"
    assert plan["options"]["weighting"] == "kfac"
    assert metrics["seconds"]["curvature"] > 0
    assert metrics["seconds"]["refit"] > 0
    scores = load_file(cut / "scores.safetensors")
    solved = {op.get("module", op.get("reader")) for op in plan["operations"]} - {None}
    assert all(float(scores[f"{name}.measured"]) >= 0 for name in solved)
    assert "Measured: mean divergence" in (cut / "report.html").read_text()
    assert {op["kind"] for op in plan["operations"]} == {
        "select_layers",
        "factorize_linear",
        "narrow_mlp",
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_other_methods_reach_the_ratio(
    preset: str, settings: list[str], tmp_path: Path
) -> None:
    words = ["--method.name=low_rank", f"--method.preset={preset}", "--method.removed_ratio=0.25"]
    assert main(["compress", *settings, *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics, plan = read(tmp_path / "run", "metrics.json"), read(tmp_path / "run", "plan.json")
    assert metrics["removed_ratio"] == pytest.approx(0.25, abs=80 / metrics["parameters"]["dense"])
    own = {key: plan["options"][key] for key in ("ranks", "refit_pull") if key in plan["options"]}
    assert own == {"svd_llm_v2": {"ranks": "per_type"}, "svd_llm_update": {"refit_pull": 0}}.get(
        preset, {}
    )
    shares = {
        round(op["rank"] / 16) for op in plan["operations"] if op["kind"] == "factorize_linear"
    }
    assert preset == "svd_llm_v2" or len(shares) <= 2  # one keep ratio for all


def test_another_ratio_from_stored_statistics_is_that_of_a_run_that_measures(
    settings: list[str],
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = tmp_path / "measured"
    assert main(["compress", *settings, *plus(0.3), f"--output_dir={measured}"]) == 0
    words = ["--from_scores", str(cut), "--calibration.num_samples=4"]
    assert main(["compress", *words, f"--output_dir={tmp_path / 'other'}"]) == 2
    assert "method.refit reads the calibration text again" in capsys.readouterr().err
    monkeypatch.setattr(
        "grasp_lightning.callbacks.measure.TrainerMeasure.__call__",
        lambda *_: pytest.fail("a pass was made"),
    )
    again = tmp_path / "again"
    words = ["--from_scores", str(cut), "--method.removed_ratio=0.3", f"--output_dir={again}"]
    assert main(["compress", *words]) == 0
    assert read(again, "plan.json") == read(measured, "plan.json")
    first, second = (load_file(f / "factors.safetensors") for f in (again, measured))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_input_moments_serve_another_method(settings: list[str], tmp_path: Path) -> None:
    factors = tmp_path / "factors"
    words = [*plus(0.2), "--method.mlp=factors", f"--output_dir={factors}"]
    assert main(["compress", *settings, *words]) == 0
    kinds = {op["kind"] for op in read(factors, "plan.json")["operations"]}
    assert kinds == {"select_layers", "factorize_linear"}
    words = [
        *("--from_scores", str(factors), "--method.name=low_rank", "--method.preset=svd_llm"),
        f"--output_dir={tmp_path / 'other'}",
    ]
    assert main(["compress", *words]) == 0
    assert read(tmp_path / "other", "plan.json")["options"]["weighting"] == "input_gram"


@pytest.mark.parametrize("words", [plus(0.2), ["--method.name=low_rank", "--method.preset=asvd"]])
def test_plan_shows_size_and_memory(
    words: list[str], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("20.0% of ")
    assert any(line.strip().startswith("auto ") for line in lines)


def test_what_was_not_measured_is_refused(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method.name=low_rank", "--method.preset=asvd", f"--output_dir={tmp_path / 'no'}"]
    assert main(["compress", "--from_scores", str(cut), *words]) == 2
    assert "has no input_scale of model.layers.0.self_attn.q_proj" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    words = ["--method.mlp=factors", f"--output_dir={tmp_path / 'no'}"]
    assert main(["compress", "--from_scores", str(cut), *words]) == 2
    assert "of model.layers.0.mlp.gate_proj; name a run with" in capsys.readouterr().err
    words = ["--method.fisher=empirical", f"--output_dir={tmp_path / 'no'}"]
    assert main(["compress", "--from_scores", str(cut), *words]) == 2
    error = capsys.readouterr().err
    assert "method.fisher is empirical here, but" in error
    assert "set method.fisher=sampled, or" in error


def test_little_memory_takes_more_passes_to_the_same_plan(
    settings: list[str], cut: Path, tmp_path: Path
) -> None:
    words = [*plus(0.2), "--statistics.max_memory=1e-5", f"--output_dir={tmp_path / 'run'}"]
    assert main(["compress", *settings, *words]) == 0
    assert len(list((tmp_path / "run").glob("statistics-*-of-00004.safetensors"))) == 4
    assert read(tmp_path / "run", "plan.json") == read(cut, "plan.json")
    again = ["--from_scores", str(tmp_path / "run"), f"--output_dir={tmp_path / 'again'}"]
    assert main(["compress", *again]) == 0
    assert read(tmp_path / "again", "plan.json") == read(cut, "plan.json")


@pytest.mark.parametrize(
    "place",
    [
        Kill("grasp_lightning.training.calibration", "CalibrationModule", "training_step", 4),
        Kill("grasp_lightning.training.layer_refit", "LayerRefit", "advance", 3),
    ],
    ids=lambda place: place.name,
)
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    place: Kill, settings: list[str], cut: Path, tmp_path: Path
) -> None:
    words = [*plus(0.2), "--calibration.batch_size=1", "--trainer.checkpoint_seconds=0"]
    argv = ["compress", *settings, *words, f"--output_dir={tmp_path / 'run'}"]
    assert killed(place, signal.SIGKILL, argv) == -signal.SIGKILL
    is_in_refit = place.name == "advance"
    assert len([*(tmp_path / "run" / "checkpoints").glob("refit-*")]) == 3 * is_in_refit
    assert main(argv) == 0
    for name in ("statistics.safetensors", "factors.safetensors", "scores.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (cut / name).read_bytes(), name
    assert read(tmp_path / "run", "plan.json")["operations"] == read(cut, "plan.json")["operations"]


def test_statistics_are_not_kept_where_that_is_not_wanted(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*plus(0.2), "--statistics.store=false", "--statistics.measured_windows=0"]
    assert main(["compress", *settings, *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    assert not list((tmp_path / "run").glob("statistics*"))
    assert not [k for k in load_file(tmp_path / "run/scores.safetensors") if "measured" in k]
    assert read(tmp_path / "run", "metrics.json")["seconds"]["cut_losses"] is None
    argv = [f"--from_scores={tmp_path / 'run'}", f"--output_dir={tmp_path / 'again'}"]
    assert main(["compress", *argv, "--method.removed_ratio=0.3"]) == 2
    assert "statistics.safetensors; runs with a method.weighting" in capsys.readouterr().err


def test_keys_of_an_earlier_run_that_do_not_fit_are_distinguished_from_those_that_are_set(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--from_scores={cut}", "--method.keep_ratio=0.5", f"--output_dir={tmp_path / 'again'}"]
    assert main(["compress", *argv]) == 2
    said = "takes method.removed_ratio or method.keep_ratio, not both; leave one unset "
    assert f"{said}(keys that are not set here come from {cut}; =null unsets one)" in (
        capsys.readouterr().err
    )
    assert main(["compress", *argv, "--method.removed_ratio=null"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.score=taylor"], "method.score would be ignored"),
        (["--method.keep_ratio=0.2"], "takes method.removed_ratio or method.keep_ratio, not both"),
        (["--method.removed_ratio=0.95"], "the feasible range of these linears is above 0 to"),
        (["--method.preset=svd_llm"], "method.preset would be ignored: method grasp_plus is one"),
        (["--method.removed_ratio=0"], "method.removed_ratio must be above 0 and below 1, got 0"),
        (["--method.gradient_damping=-1"], "method.gradient_damping must be from 0 to 100, got -1"),
        (
            ["--method.weighting=input_gram", "--method.fisher=sampled"],
            "method.fisher would be ignored: method.weighting is input_gram",
        ),
        (["--method.multiple_of=0"], "method.multiple_of must be at least 1"),
        (["--method.mlp=heads"], "expected one of factors, channels"),
        (["--method.ranks=uniform", "--method.mlp=channels"], "method.ranks is uniform"),
        (["--statistics.max_memory=0"], "statistics.max_memory must be above 0"),
        (["--statistics.measured_windows=-1"], "statistics.measured_windows cannot be negative"),
        (
            ["--method.name=low_rank", "--method.preset=paper"],
            "method.preset paper does not belong to method low_rank, which has: svd_llm",
        ),
        (
            ["--method.name=grasp", "--method.keep_ratio=0.1", "--method.weighting=kfac"],
            "method.weighting would be ignored: method grasp scores components of the plain SVD",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["compress", *settings, *plus(0.2), *words, f"--output_dir={tmp_path / 'run'}"]
    assert main(argv) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len([line for line in errors.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "run").exists()
