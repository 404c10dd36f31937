"""The search for ranks as a user runs it: its losses are shared, cut again, and limited in time."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny

pytestmark = pytest.mark.slow  # runs the program several times


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = save_tiny(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=2)
    settings = ("source=pydoc", "num_samples=3", "seqlen=32")
    return [
        "compress",
        f"--model.path={model}",
        "--method.name=low_rank",
        "--method.preset=asvd_search",
        *(f"--{section}.{word}" for section in ("calibration", "evaluation") for word in settings),
    ]


def test_losses_are_shared_and_cut_again_without_a_search(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = [*argv, f"--statistics.shared={tmp_path / 'shared'}"]
    searched, shared, cut = (tmp_path / name for name in ("searched", "shared_run", "cut"))
    assert main([*sharing, "--method.removed_ratio=0.1", f"--output_dir={searched}"]) == 0
    monkeypatch.setattr(
        "grasp_lightning.callbacks.measure.TrainerMeasure._sensitivity",
        lambda *_: pytest.fail("it was measured again"),
    )
    other = "--method.removed_ratio=0.2"
    assert main([*sharing, other, f"--output_dir={shared}"]) == 0
    assert main(["compress", f"--from_scores={searched}", other, f"--output_dir={cut}"]) == 0
    assert read(shared, "plan.json")["operations"] == read(cut, "plan.json")["operations"]
    removed = [read(run, "metrics.json")["removed_ratio"] for run in (searched, shared)]
    assert removed == [pytest.approx(0.1, abs=0.01), pytest.approx(0.2, abs=0.01)]
    assert "126 of 126 truncations measured" in (cut / "report.html").read_text()


def test_what_was_not_searched_is_refused(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = [*argv, "--method.layers=[1]", "--method.removed_ratio=0.05"]
    assert main([*part, f"--output_dir={tmp_path / 'part'}"]) == 0
    again = ["compress", f"--from_scores={tmp_path / 'part'}", f"--output_dir={tmp_path / 'no'}"]
    for word, says in (
        ("--method.layers=[0,1]", "has no input_scale of model.layers.0"),
        ("--method.weighting=none", "method.weighting is none here and scale_columns in"),
    ):
        assert main([*again, word]) == 2
        assert says in capsys.readouterr().err


def test_a_limited_search_meets_the_budget_and_says_how_much_it_measured(
    argv: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--method.search_minutes=1e-9", "--method.removed_ratio=0.1", f"--output_dir={run}"]
    assert main([*argv, *words]) == 0
    assert read(run, "metrics.json")["removed_ratio"] == pytest.approx(0.1, abs=0.01)
    assert load_file(run / "scores.safetensors")["sensitivity.counts"].tolist() == [14, 126]
    assert "Search for ranks: 14 of 126 truncations measured" in (run / "report.html").read_text()
