"""A killed run resumes and ends with the same bytes as an uninterrupted one."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.calibration import CalibrationModule
from tests.conftest import save_tiny, tiny_model
from tests.integration.forked import killed
from tests.integration.killing import Kill

CALIBRATION = "grasp_lightning.training.calibration"
KILLS = {
    "similarity": Kill(CALIBRATION, "CalibrationModule", "predict_step", 3),
    "attribution": Kill(CALIBRATION, "CalibrationModule", "training_step", 2),
    "first batch": Kill(CALIBRATION, "CalibrationModule", "training_step", 1),
    "third block": Kill(CALIBRATION, "CalibrationModule", "training_step", 11),
    "between steps": Kill("grasp_lightning.pipeline", "", "apply_operations", 3),
    "last file": Kill("grasp_lightning.commands.outputs", "", "render_report", 1),
    # That file of a run is completely written, but not yet moved into place.
    "file write": Kill("grasp_lightning.run_folder.files", "", "replace_synced", 10),
    "late file write": Kill("grasp_lightning.run_folder.files", "", "replace_synced", 24),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--method.name=grasp",
        "--method.num_layers=2",
        "--method.keep_ratio=0.3",
        "--calibration.source=pydoc",
        "--calibration.num_samples=7",
        "--calibration.seqlen=32",
        "--calibration.batch_size=2",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
        "--trainer.checkpoint_seconds=0",
    ]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs, by preset."""
    folders = {}
    for preset in ("paper", "released"):
        folders[preset] = tmp_path_factory.mktemp("whole") / preset
        argv = [*settings, f"--method.preset={preset}", f"--output_dir={folders[preset]}"]
        assert main(["compress", *argv]) == 0
    return folders


def assert_equal_runs(first: Path, second: Path) -> None:
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    for name in ("scores.safetensors", "factors.safetensors", "model/model.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert not (second / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "preset"),
    [
        ("similarity", "paper"),
        ("attribution", "paper"),
        ("first batch", "paper"),
        ("file write", "paper"),
        ("last file", "paper"),
        ("third block", "released"),
        ("between steps", "released"),
        ("late file write", "released"),
    ],
)
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    place: str, preset: str, settings: list[str], whole: dict[str, Path], tmp_path: Path
) -> None:
    argv = [*settings, f"--method.preset={preset}", f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS[place], signal.SIGKILL, ["compress", *argv]) == -signal.SIGKILL
    assert (tmp_path / "run").is_dir()
    assert main(["compress", *argv]) == 0
    assert_equal_runs(whole[preset], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number"), [("similarity", signal.SIGTERM), ("attribution", signal.SIGINT)]
)
def test_a_signal_saves_at_the_next_batch_and_says_how_to_go_on(
    place: str, number: int, settings: list[str], whole: dict[str, Path], tmp_path: Path
) -> None:
    # Nothing is saved except because of the signal.
    argv = [*settings, "--trainer.checkpoint_seconds=1000", f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS[place], number, ["compress", *argv]) == 128 + number
    state = load_file(tmp_path / "run" / "checkpoints" / "pass-0-0.safetensors")
    assert state["windows"].tolist() == list(range(2 * KILLS[place][3]))
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert size < sum(parameter.nbytes for parameter in tiny_model().parameters())
    assert main(["compress", *argv]) == 0
    assert_equal_runs(whole["paper"], tmp_path / "run")


@pytest.mark.slow
def test_a_resumed_pass_does_only_what_is_left(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*settings, f"--output_dir={tmp_path / 'run'}"]
    assert killed(KILLS["attribution"], signal.SIGKILL, ["compress", *argv]) == -signal.SIGKILL
    batches: list[list[int]] = []
    original = CalibrationModule.training_step

    def noting(self: CalibrationModule, batch: dict, batch_idx: int) -> None:
        batches.append(batch["index"].tolist())
        original(self, batch, batch_idx)

    monkeypatch.setattr(CalibrationModule, "training_step", noting)
    monkeypatch.setattr(
        CalibrationModule, "predict_step", lambda *_: pytest.fail("similarity was measured again")
    )
    assert main(["compress", *argv]) == 0
    assert batches == [[2, 3], [4, 5], [6]]


@pytest.mark.slow
def test_text_of_the_model_resumes_where_it_was_killed(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*settings, "--calibration.source=[pydoc,self]", "--calibration.num_samples=70"]
    assert main(["compress", *words, f"--output_dir={tmp_path / 'whole'}"]) == 0
    argv = ["compress", *words, f"--output_dir={tmp_path / 'run'}"]
    writing = Kill("grasp_lightning.models.sampling", "", "_continued", 2)
    assert killed(writing, signal.SIGKILL, argv) == -signal.SIGKILL
    assert len(load_file(tmp_path / "run" / "sampled_text.safetensors")["input_ids"]) == 16
    assert killed(KILLS["attribution"], signal.SIGTERM, argv) == 128 + signal.SIGTERM
    monkeypatch.setattr(
        "grasp_lightning.models.sampling._continued", lambda *_: pytest.fail("written again")
    )
    assert main(argv) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def crash(argv: list[str]) -> None:
    """Run to the last step, and fail with an injected bug when the outputs are written."""

    def fail(*_: object) -> None:
        raise OSError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grasp_lightning.commands.compress.write_outputs", fail)
        with pytest.raises(OSError, match="crash"):
            main(["compress", *argv])


@pytest.mark.slow
def test_a_changed_model_is_noticed_when_a_run_resumes(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model")
    argv = [*settings, f"--model.path={model}", f"--output_dir={tmp_path / 'run'}"]
    crash(argv)
    save_tiny(model, seed=5)
    assert main(["compress", *argv]) == 2
    assert "model or calibration text has changed" in capsys.readouterr().err
    assert main(["compress", *argv, "--overwrite"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("later", "goes_on"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, False),  # such as a second command by hand in an allocation
        ({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, False),
    ],
)
def test_a_job_that_is_put_back_does_not_overwrite_its_own_run(
    later: dict[str, str],
    goes_on: bool,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [*settings, f"--output_dir={tmp_path / 'run'}", "--overwrite"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    crash(argv)
    monkeypatch.delenv("SLURM_JOB_ID")
    for key, value in later.items():
        monkeypatch.setenv(key, value)
    passes = []
    original = TrainerMeasure.__call__

    def noting(self: TrainerMeasure, view: DecoderView, step: Step) -> Statistics:
        passes.append(step.name)
        return original(self, view, step)

    monkeypatch.setattr(TrainerMeasure, "__call__", noting)
    assert main(["compress", *argv]) == 0
    assert bool(passes) != goes_on
    # Another configuration is another run.
    passes.clear()
    assert main(["compress", *argv, "--seed=1"]) == 0
    assert passes


def test_a_start_that_is_refused_leaves_the_text_of_the_model(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")
    own = [f"--model.path={model}", "--calibration.source=self", f"--output_dir={tmp_path / 'run'}"]
    argv = [*settings, *own]
    crash(argv)
    text = (tmp_path / "run" / "sampled_text.safetensors").read_bytes()
    save_tiny(model, seed=5)
    assert main(["compress", *argv]) == 2
    assert "model or calibration text has changed" in capsys.readouterr().err
    assert (tmp_path / "run" / "sampled_text.safetensors").read_bytes() == text


@pytest.mark.parametrize("word", ["--evaluation.num_samples=100000", "--evaluation.seqlen=4096"])
def test_no_text_is_written_for_a_run_that_is_refused(
    word: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "grasp_lightning.models.sampling._continued", lambda *_: pytest.fail("text was written")
    )
    argv = [*settings, "--calibration.source=self", word, f"--output_dir={tmp_path / 'run'}"]
    assert main(["compress", *argv]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_crash_after_the_last_step_repeats_no_pass(
    settings: list[str], whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*settings, f"--output_dir={tmp_path / 'run'}"]
    crash(argv)
    monkeypatch.setattr(
        "grasp_lightning.callbacks.measure.TrainerMeasure.__call__",
        lambda *_: pytest.fail("measured again"),
    )
    assert main(["compress", *argv]) == 0
    assert_equal_runs(whole["paper"], tmp_path / "run")
