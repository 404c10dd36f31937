"""Runs with ``statistics.shared`` measure once, and decide as if each had measured."""

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.cli import main
from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import Interrupted
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import DropLayers, FactorizeLinear, OptionValue, Plan
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Needs, Statistics, Step
from grasp_lightning.storage.progress import RunProgress
from grasp_lightning.storage.shared import SharedFolder
from grasp_lightning.storage.shared_statistics import SharedMeasure
from tests.conftest import byte_tokenizer, save_tiny, tiny_model
from tests.integration.forked import run_ranks

pytestmark = pytest.mark.slow  # most tests run the program several times

TENSORS = ("scores.safetensors", "factors.safetensors", "statistics.safetensors")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--calibration.num_samples=4",
        "--calibration.seqlen=32",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
    ]


def run(folder: Path, settings: list[str], *words: str) -> dict[str, Any]:
    """The metrics of a run; its text is pydoc unless the words name another."""
    argv = ["--calibration.source=pydoc", *settings, *words, f"--output_dir={folder}"]
    assert main(["compress", *argv]) == 0
    return dict(json.loads((folder / "metrics.json").read_text()))


def shared(tmp_path: Path) -> str:
    return f"--statistics.shared={tmp_path / 'shared'}"


def assert_equal_runs(first: Path, second: Path) -> None:
    """Plans and tensors are the same to the byte."""
    for name in ("plan.json", *TENSORS):
        assert (first / name).is_file() == (second / name).is_file(), name
        if (first / name).is_file():
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def entries(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (tmp_path / "shared").glob("*/entry.json")]


def forbid_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_pass", "_moments", "_removal_losses"):
        monkeypatch.setattr(TrainerMeasure, name, lambda *_: pytest.fail("a pass was made"))


def test_ratios_share_one_curvature_pass(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    many = "--calibration.batch_size=3"
    run(first, settings, shared(tmp_path), "--method.removed_ratio=0.2", many)
    run(alone, settings, "--method.removed_ratio=0.3")
    forbid_passes(monkeypatch)
    metrics = run(second, settings, shared(tmp_path), "--method.removed_ratio=0.3")
    assert_equal_runs(alone, second)
    (entry,) = entries(tmp_path)
    assert metrics["seconds"]["curvature"] == pytest.approx(entry["seconds"], abs=0.01)
    assert (first / TENSORS[2]).samefile(second / TENSORS[2])
    # What it has read is its own: it can be cut again without the shared folder.
    cut = ["--from_scores", str(second), "--method.removed_ratio=0.1"]
    assert main(["compress", *cut, f"--output_dir={tmp_path / 'cut'}"]) == 0


def test_moments_of_several_passes_are_shared(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method.name=low_rank", "--method.preset=svd_llm", shared(tmp_path)]
    little = ["--statistics.max_memory=1e-5", "--statistics.store=false"]
    run(tmp_path / "first", settings, *words, *little, "--method.removed_ratio=0.2")
    assert not list((tmp_path / "first").glob("statistics*"))
    assert len(list((tmp_path / "shared").glob("*/statistics-*-of-*"))) > 1
    forbid_passes(monkeypatch)
    run(tmp_path / "second", settings, *words, "--method.removed_ratio=0.2")
    for name in ("plan.json", *TENSORS[:2]):
        first, second = tmp_path / "first" / name, tmp_path / "second" / name
        assert first.read_bytes() == second.read_bytes()


def test_a_damaged_entry_is_measured_again(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method.removed_ratio=0.2", shared(tmp_path)]
    run(tmp_path / "first", settings, *words)
    (file,) = (tmp_path / "shared").glob("*/statistics.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the run has the same file
    file.write_bytes(content)
    capsys.readouterr()
    run(tmp_path / "second", settings, *words)
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("WARNING")]
    assert len(warnings) == 1
    assert "it has changed since it was written; it is measured again" in warnings[0]
    assert_equal_runs(tmp_path / "first", tmp_path / "second")


def test_methods_share_similarities_and_nothing_else(settings: list[str], tmp_path: Path) -> None:
    words = [shared(tmp_path), "--method.num_layers=1"]
    run(tmp_path / "drop", settings, *words, "--method.name=drop")
    assert len(entries(tmp_path)) == 1
    run(tmp_path / "grasp", settings, *words, "--method.name=grasp", "--method.keep_ratio=0.3")
    assert len(entries(tmp_path)) == 2
    # Other windows, another metric and another model are other measurements.
    for name, change in (
        ("seed", "--seed=1"),
        ("metric", "--method.layer_metric=angular"),
        ("dtype", "--model.dtype=bfloat16"),
    ):
        before = len(entries(tmp_path))
        run(tmp_path / name, settings, *words, "--method.name=drop", change)
        assert len(entries(tmp_path)) == before + 1, name


def test_generated_text_is_shared(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--calibration.source=self", "--method.name=drop"]
    run(tmp_path / "first", settings, *words, shared(tmp_path), "--method.num_layers=1")
    run(tmp_path / "alone", settings, *words, "--method.num_layers=2")
    monkeypatch.setattr(
        "grasp_lightning.storage.sampled_text.sample_text",
        lambda *_, **__: pytest.fail("text was generated"),
    )
    metrics = run(tmp_path / "second", settings, *words, shared(tmp_path), "--method.num_layers=2")
    assert_equal_runs(tmp_path / "alone", tmp_path / "second")
    texts = [tmp_path / name / "sampled_text.safetensors" for name in ("alone", "second")]
    assert texts[0].read_bytes() == texts[1].read_bytes()
    (entry,) = (entry for entry in entries(tmp_path) if "text" in entry["facts"])
    assert metrics["seconds"]["sample"] == pytest.approx(entry["seconds"], abs=0.01)


def test_several_processes_share(settings: list[str], tmp_path: Path) -> None:
    argv = ["compress", "--calibration.source=pydoc", *settings, "--trainer.devices=2"]
    for name, ratio, more in (
        ("first", 0.2, [shared(tmp_path)]),
        ("second", 0.3, [shared(tmp_path)]),
        ("alone", 0.3, []),
    ):
        words = [f"--method.removed_ratio={ratio}", f"--output_dir={tmp_path / name}"]
        outcome = run_ranks([*argv, *words, *more], 2)
        assert outcome.codes == [0, 0], outcome.text
    assert len(entries(tmp_path)) == 1
    assert_equal_runs(tmp_path / "alone", tmp_path / "second")


class Greedy(CompressionMethod):
    """Deletes the layer that changes its input least, and measures again, a number of times."""

    name, reference = "greedy", ""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def options(self) -> Mapping[str, OptionValue]:
        return {"num_layers": self.number}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        del model
        if len(plan.dropped_layers) == self.number:
            return None
        return Step(name="greedy", needs=Needs(layer_metric="similarity"))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        del step
        assert stats.layer_metric is not None
        layer = model.layer_indices[int(stats.layer_metric.argmax())]
        return Decision(operations=(DropLayers(layers=(layer,)),))

    def predict(self, view: DecoderView) -> Prediction:
        raise NotImplementedError


class Solved(Greedy):
    """Replaces a linear by factors of a given size, then measures; the plan has no trace of it."""

    def __init__(self, size: float) -> None:
        self.size = size

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        name = next(iter(model.all_linears()))
        if plan.ranks:
            return None if plan.selected_layers else super().next_step(model, plan)
        return Step(
            name="solve", needs=Needs(moments=(name,), moment_kinds=frozenset({"input_scale"}))
        )

    number = 1

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        if step.name != "solve":
            return super().decide(step, model, stats)
        (name,) = step.needs.moments
        rows, columns = model.all_linears()[name].weight.shape
        tensors = {
            f"{name}.left": torch.full((rows, 1), self.size),
            f"{name}.right": torch.ones(1, columns),
        }
        operation = FactorizeLinear(module=name, rank=1, components=None)
        return Decision(operations=(operation,), tensors=tensors)


class Counting:
    """A ``Measure`` that counts its calls."""

    def __init__(self, progress: RunProgress) -> None:
        data = CalibrationConfig(source="pydoc", num_samples=3, seqlen=24)
        self._measure = TrainerMeasure(
            CalibrationData(data, byte_tokenizer()), progress=False, store=progress
        )
        self.calls = 0

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        self.calls += 1
        return self._measure(view, step)


def steps(method: CompressionMethod, folder: Path, shares: bool = True) -> tuple[Plan, int]:
    """The plan of a method on a tiny model, and how many steps it has measured itself."""
    view = DecoderView(tiny_model(num_hidden_layers=6))
    plan = Plan(method=method.name, options=method.options, inputs={"calibration": "x"})
    with RunFolder.open(folder, {}) as run_folder:
        progress = RunProgress(run_folder, plan)
        measure = Counting(progress)
        store = SharedFolder(folder.parent / "shared", {"model": "x"}, Phases())
        wrapped = SharedMeasure(measure, store, progress, {}) if shares else measure
        return compress(view, method, wrapped, progress.plan, progress.add_step), measure.calls


def test_time_before_an_interruption_counts(tmp_path: Path) -> None:
    view = DecoderView(tiny_model())
    step = Greedy(1).next_step(view, Plan(method="greedy"))
    assert step is not None
    is_first = [True]

    def measure(_: DecoderView, __: Step) -> Statistics:
        time.sleep(0.2)
        if is_first and is_first.pop():
            raise Interrupted(signal.SIGTERM)
        return Statistics()

    with RunFolder.open(tmp_path / "run", {}) as folder:
        progress = RunProgress(folder, Plan(method="greedy"))
        phases = Phases()
        shared_measure = SharedMeasure(
            measure, SharedFolder(tmp_path / "shared", {}, phases), progress, {}
        )
        with pytest.raises(Interrupted):
            shared_measure(view, step)
        shared_measure(view, step)
    (entry,) = entries(tmp_path)
    assert entry["seconds"] == pytest.approx(0.4, abs=0.1)


def test_a_longer_search_starts_from_the_steps_of_a_shorter_one(tmp_path: Path) -> None:
    short, measured = steps(Greedy(2), tmp_path / "short")
    assert measured == 2
    long, measured = steps(Greedy(4), tmp_path / "long")
    assert measured == 2
    assert long.operations[:2] == short.operations
    assert steps(Greedy(4), tmp_path / "alone", shares=False) == (long, 4)


def test_statistics_of_other_tensors_are_not_taken(tmp_path: Path) -> None:
    first, measured = steps(Solved(0.0), tmp_path / "first")
    assert measured == 2
    second, measured = steps(Solved(9.0), tmp_path / "second")
    assert measured == 1  # of the dense model, before the tensors
    assert first.operations[0] == second.operations[0]
    assert steps(Solved(9.0), tmp_path / "third") == (second, 0)
