"""``compress --dry_run``: the forecast of ``plan``, the checks of a run, and nothing written."""

from pathlib import Path

import pytest

from grasp_lightning.cli import main
from grasp_lightning.commands.compress import resolved
from grasp_lightning.config import CompressConfig
from grasp_lightning.config.parsing import parse, to_dict
from grasp_lightning.run_folder import RunFolder
from tests.conftest import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def settings(model: Path, tmp_path: Path) -> list[str]:
    return [
        f"--model.path={model}",
        f"--output_dir={tmp_path / 'runs' / 'x'}",
        "--calibration.source=pydoc",
        "--calibration.num_samples=4",
        "--calibration.seqlen=48",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=3",
        "--evaluation.seqlen=48",
    ]


def begun(settings: list[str]) -> RunFolder:
    """Begin the run of a command line, and return its folder, still locked."""
    config, _ = resolved(parse(CompressConfig, "compress", settings))
    assert config.output_dir is not None
    return RunFolder.open(config.output_dir, to_dict(config))


def contents(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_prints_the_forecast_of_plan_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings]) == 0
    forecast = capsys.readouterr().out
    assert main(["compress", *settings, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(forecast)
    assert f"to {tmp_path / 'runs' / 'x'}." in out[len(forecast) :]
    assert contents(tmp_path) == {}


def test_it_says_that_an_unfinished_run_would_go_on(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(settings).close()
    before = contents(tmp_path)
    assert main(["compress", *settings, "--dry_run"]) == 0
    assert "an unfinished run of this configuration, which would resume" in capsys.readouterr().out
    assert main(["compress", *settings, "--dry_run", "--overwrite"]) == 0
    assert "would be deleted first" in capsys.readouterr().out
    assert main(["compress", *settings, "--dry_run", "--seed=1"]) == 2
    assert "seed is 1 here and 0 in" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_it_says_that_a_run_is_finished(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(settings) as run:
        run.finish()
    before = contents(tmp_path)
    assert main(["compress", *settings, "--dry_run"]) == 0
    assert "holds the finished run of this configuration" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_it_refuses_a_folder_that_another_process_writes(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(settings):
        assert main(["compress", *settings, "--dry_run"]) == 2
        assert "another process writes to" in capsys.readouterr().err


def test_a_full_disk_is_an_error(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp_lightning.commands.inputs._SAFETY", 1e15)
    assert main(["compress", *settings, "--dry_run"]) == 2
    assert "are free; free some space or use another output_dir" in capsys.readouterr().err


def test_text_on_the_hub_is_named_and_not_read(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["--calibration.source=[c4,self]", "--evaluation.source=wikitext2"]
    assert main(["compress", *settings, *sources, "--dry_run"]) == 0
    assert "the text of c4, self, wikitext2." in capsys.readouterr().out
    split = "--evaluation.split=spam"
    assert main(["compress", *settings, *sources, split, "--dry_run"]) == 2
    assert "evaluation.split 'spam' is unknown" in capsys.readouterr().err
