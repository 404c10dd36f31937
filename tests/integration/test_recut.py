"""Another ratio from stored scores gives the plan of a full run, without a pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_lightning.cli import main
from tests.conftest import save_tiny

pytestmark = pytest.mark.slow  # every test runs the program several times


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--method.name=grasp",
        "--calibration.source=pydoc",
        "--calibration.num_samples=4",
        "--calibration.seqlen=32",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
    ]


@pytest.fixture(scope="module")
def scored(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two layers at 0.3."""
    folder = tmp_path_factory.mktemp("runs") / "scored"
    argv = [*settings, "--method.num_layers=2", "--method.keep_ratio=0.3"]
    assert main(["compress", *argv, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "grasp_lightning.callbacks.measure.TrainerMeasure.__call__",
        lambda *_: pytest.fail("a pass was made"),
    )


def operations(folder: Path) -> list:
    content: dict = json.loads((folder / "plan.json").read_text())
    return list(content["operations"])


@pytest.mark.usefixtures("no_pass")
def test_another_ratio_needs_no_pass(scored: Path, tmp_path: Path) -> None:
    argv = ["--from_scores", str(scored), "--method.keep_ratio=0.2"]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'cut'}"]) == 0
    metrics = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert metrics["parameters"]["compressed"] < metrics["parameters"]["dense"]
    assert metrics["perplexity"]["compressed"] is not None


def test_the_plan_is_that_of_a_run_that_measures(
    settings: list[str], scored: Path, tmp_path: Path
) -> None:
    change = ["--method.num_layers=1", "--method.keep_ratio=0.2"]
    argv = ["--from_scores", str(scored), *change, f"--output_dir={tmp_path / 'cut'}"]
    assert main(["compress", *argv]) == 0
    assert main(["compress", *settings, *change, f"--output_dir={tmp_path / 'measured'}"]) == 0
    cut, measured = tmp_path / "cut", tmp_path / "measured"
    assert (cut / "plan.json").read_bytes() == (measured / "plan.json").read_bytes()
    left, right = (load_file(folder / "factors.safetensors") for folder in (cut, measured))
    assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--method.num_layers=3"], "score all layers with method.score_all_layers"),
        (["--method.reduction=signed"], "method.reduction is signed here"),
        (["--method.schedule=iterative"], "schedule iterative needs new measurements"),
        (["--method.layer_metric=angular"], "has no layer_angular_distance"),
        (
            ["--model.dtype=bfloat16"],
            "has scores of a different model, or of this model in a different dtype",
        ),
    ],
)
def test_what_was_not_scored_is_refused(
    change: list[str],
    message: str,
    scored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--from_scores", str(scored), *change, f"--output_dir={tmp_path / 'cut'}"]
    assert main(["compress", *argv]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "cut").exists()


def test_other_singular_values_are_noticed(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("plan.json", "config.yaml"):
        (copy / name).write_bytes((scored / name).read_bytes())
    scores = load_file(scored / "scores.safetensors")
    key = next(key for key in scores if key.endswith("singular_values"))
    scores[key] = scores[key] * 1.01
    save_file(scores, copy / "scores.safetensors")
    argv = ["--from_scores", str(copy), f"--output_dir={tmp_path / 'cut'}"]
    assert main(["compress", *argv]) == 2
    assert "the scores belong to other weights" in capsys.readouterr().err


def test_all_layers_can_be_scored_for_later(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [*settings, "--method.num_layers=1", "--method.score_all_layers"]
    assert main(["compress", *every, f"--output_dir={tmp_path / 'all'}"]) == 0
    assert [op["kind"] for op in operations(tmp_path / "all")].count("factorize_linear") == 7
    change = ["--method.num_layers=3", "--method.keep_ratio=0.2"]
    argv = ["--from_scores", str(tmp_path / "all"), *change]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'cut'}"]) == 0
    assert main(["compress", *settings, *change, f"--output_dir={tmp_path / 'measured'}"]) == 0
    assert operations(tmp_path / "cut") == operations(tmp_path / "measured")
    iterative = [*settings, "--method.num_layers=1", "--method.schedule=iterative"]
    assert main(["compress", *iterative, f"--output_dir={tmp_path / 'iterative'}"]) == 0
    argv = ["--from_scores", str(tmp_path / "iterative"), f"--output_dir={tmp_path / 'no'}"]
    capsys.readouterr()
    assert main(["compress", *argv]) == 2
    assert "only runs with one_shot can be cut again" in capsys.readouterr().err


def test_a_folder_without_scores_is_named(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*settings, "--method.num_layers=1", f"--from_scores={tmp_path / 'nowhere'}"]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "is not a finished run with scores: it has no config.yaml" in capsys.readouterr().err


def test_a_run_does_not_take_the_place_of_its_own_scores(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = (scored / "plan.json").read_bytes()
    argv = [f"--from_scores={scored}", "--method.keep_ratio=0.2", f"--output_dir={scored}/."]
    assert main(["compress", *argv, "--overwrite"]) == 2
    assert "is also output_dir; use another output_dir" in capsys.readouterr().err
    assert (scored / "plan.json").read_bytes() == plan


@pytest.fixture(scope="module")
def with_statistics(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "statistics"
    argv = [*settings, "--method.name=low_rank", "--method.preset=svd_llm"]
    argv += ["--method.removed_ratio=0.2", f"--output_dir={folder}"]
    assert main(["compress", *argv]) == 0
    return folder


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def change_option(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "plan.json").read_text())
        content["options"][key] = value
        (folder / "plan.json").write_text(json.dumps(content))

    return change


def change_tensors(name: str, part: str, how: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with safe_open(folder / name, framework="pt") as content:
            metadata = content.metadata() or {}
        metadata.pop("layout", None)  # as a file of an earlier version, or of a skilled hand
        tensors = {
            key: how(value) if part in key else value
            for key, value in load_file(folder / name).items()
        }
        save_file(tensors, folder / name, metadata)

    return change


SCORES, STATISTICS = "scores.safetensors", "statistics.safetensors"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "scores",
            change_json("manifest.json", state="unfinished"),
            "it is unfinished; let it",
        ),
        ("scores", change_json("plan.json", complete="yes"), "complete: expected bool, got 'yes'"),
        ("scores", change_json("plan.json", complete=False), "does not say that it is complete"),
        ("scores", change_json("plan.json", method="drop"), "says name drop, its config.yaml says"),
        ("scores", change_option("reduction", "signed"), "says reduction signed, its config.yaml"),
        ("scores", change_tensors(SCORES, ".scores", lambda t: t * torch.nan), "are not finite"),
        (
            "scores",
            change_tensors(SCORES, ".scores", lambda t: t[1:].clone()),
            "must be torch.",
        ),
        ("scores", change_tensors(SCORES, ".scores", lambda t: t.half()), "must be torch.float32"),
        ("scores", lambda folder: (folder / SCORES).write_bytes(b""), "is damaged"),
        (
            "statistics",
            change_json("plan.json", inputs={"model": "x"}),
            "measured for another plan",
        ),
        ("statistics", change_option("input_damping", 0.5), "input_damping"),
        ("statistics", change_tensors(STATISTICS, "", lambda t: t * torch.nan), "are not finite"),
        ("statistics", change_tensors(STATISTICS, "", lambda t: t[1:].clone()), "must have shape"),
        ("statistics", change_tensors(STATISTICS, "", lambda t: t.half()), "must be torch.float32"),
        ("statistics", lambda folder: (folder / STATISTICS).write_bytes(b""), "is damaged"),
    ],
)
def test_a_run_that_is_not_what_it_says_is_not_cut_again(  # noqa: PLR0917  fixtures
    kind: str,
    change: Callable[[Path], object],
    message: str,
    scored: Path,
    with_statistics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(scored if kind == "scores" else with_statistics, tmp_path / "run")
    change(tmp_path / "run")
    ratio = "--method.keep_ratio=0.2" if kind == "scores" else "--method.removed_ratio=0.1"
    argv = [f"--from_scores={tmp_path / 'run'}", ratio, f"--output_dir={tmp_path / 'cut'}"]
    capsys.readouterr()
    assert main(["compress", *argv]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in told
    assert "name another run, or measure without from_scores" in told
    assert not (tmp_path / "cut").exists()
