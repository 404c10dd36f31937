"""A span of layers replaced by one trained layer, from ``compress`` to a saved model."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.cli import main
from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import NumericsError
from grasp_lightning.memory.calibration import training_bytes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Plan, RemoveBlock, SelectLayers, SetWeights
from grasp_lightning.stats.base import Needs, SpanTraining, Step
from grasp_lightning.training.layer_streams import LayerRunner
from grasp_lightning.training.span import SpanModule
from tests.conftest import byte_tokenizer, save_tiny, tiny_model
from tests.integration.forked import killed
from tests.integration.killing import Kill

IDS = torch.arange(12)[None]
SPAN = (1, 2, 3)
MODULE = "grasp_lightning.training.span"
KILLS = {
    "inside an epoch": Kill(MODULE, "SpanModule", "training_step", 5),
    "in a validation": Kill(MODULE, "SpanModule", "validation_step", 3),
    "after the training": Kill("grasp_lightning.pipeline", "", "apply_operations", 2),
}


def words(source: Path, run: Path, *more: str) -> list[str]:
    keys = {
        "calibration": ("source=pydoc", "num_samples=12", "seqlen=32", "batch_size=2"),
        "evaluation": ("source=pydoc", "num_samples=2", "seqlen=32"),
        "method": ("name=llm_streamline", "epochs=3", "step_windows=4", "learning_rate=3e-3"),
        "trainer": ("checkpoint_seconds=0",),
    }
    options = [f"--{section}.{key}" for section, found in keys.items() for key in found]
    return [f"--model.path={source}", f"--output_dir={run}", *options, *more]


def calibration(batch_size: int = 2) -> CalibrationData:
    config = CalibrationConfig(source="pydoc", num_samples=20, seqlen=32, batch_size=batch_size)
    return CalibrationData(config, byte_tokenizer())


def training(view: DecoderView, epochs: int, **more: float) -> Step:
    names = tuple(name for name, _ in view.layer(SPAN[0]).named_parameters())
    span = SpanTraining(
        layers=SPAN,
        parameters=names,
        epochs=epochs,
        learning_rate=more.get("learning_rate", 3e-3),
        step_windows=4,
    )
    return Step(name="train_layer", needs=Needs(span_training=span))


def squared_error(dense: DecoderView, other: DecoderView, data: CalibrationData) -> float:
    """Return how far the first layer of another model is from the span of the dense one."""
    batches = {0: data.windows.batch(range(len(data.windows)))}
    ((_, entering, leaving),) = LayerRunner(dense).states_around(SPAN[0], SPAN[-1], batches)
    runner = LayerRunner(other)
    list(runner.inputs_of(0, batches))
    with runner.only(SPAN[0]) as run:
        return float((run(batches[0], entering) - leaving).square().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_lowers_the_error_and_leaves_the_model_unchanged(family: str) -> None:
    model, data = tiny_model(family), calibration()
    view = DecoderView(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = training(view, epochs=6)
    found = TrainerMeasure(data, progress=False)(view, step).trained
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    trained = DecoderView(tiny_model(family))
    span = step.needs.span_training
    assert span is not None
    layer = f"{view.layers_name}.{SPAN[0]}"
    apply_operations(trained, [SetWeights(module=layer, parameters=span.parameters)], found)
    assert squared_error(view, trained, data) < 0.8 * squared_error(view, view, data)


def test_hidden_states_on_disk_give_the_same_weights() -> None:
    view, data = DecoderView(tiny_model()), calibration()
    step = training(view, epochs=2)
    in_memory = TrainerMeasure(data, progress=False)(view, step).trained
    on_disk = TrainerMeasure(data, progress=False, max_bytes=20_000)(view, step).trained
    assert all(torch.equal(in_memory[name], on_disk[name]) for name in in_memory)


def test_a_layer_that_training_makes_worse_stays_as_it_was() -> None:
    view = DecoderView(tiny_model())
    step = training(view, epochs=1, learning_rate=0.5)
    found = TrainerMeasure(calibration(), progress=False)(view, step).trained
    weights = view.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_a_training_that_diverges_names_the_rate() -> None:
    view = DecoderView(tiny_model())
    step = training(view, epochs=1, learning_rate=1e30)
    with pytest.raises(NumericsError, match=r"in step 1; lower method\.learning_rate"):
        TrainerMeasure(calibration(), progress=False)(view, step)


def test_without_training_the_others_are_deleted(tmp_path: Path) -> None:
    source, run = save_tiny(tmp_path / "source"), tmp_path / "run"
    more = ["--method.layers=[1,2,3]", "--method.epochs=0"]
    assert main(["compress", *words(source, run, *more)]) == 0
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    apply_operations(DecoderView(dense), [DropLayers(layers=(2, 3))], {})
    found = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(found(IDS).logits, dense(IDS).logits)


def test_what_cannot_be_trained_is_refused_before_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = save_tiny(tmp_path / "source"), tmp_path / "run"
    argv = words(source, run, "--method.num_layers=2")
    assert main(["compress", *argv, "--trainer.strategy=fsdp"]) == 2
    error = capsys.readouterr().err
    assert "trainer.strategy is fsdp, but method llm_streamline trains a whole layer" in error
    assert main(["compress", *argv, "--method.layers=[1,3]", "--method.num_layers=null"]) == 2
    assert "replaces contiguous layers by one" in capsys.readouterr().err
    assert not run.exists()


def test_plan_knows_the_size_and_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(tmp_path / "source")
    assert main(["plan", *words(source, tmp_path / "run", "--method.num_layers=2")]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1] == "3 contiguous layers are replaced by one"
    calibration_table = text.partition("compensation with")[0]
    assert "backward pass through one layer" in calibration_table
    assert "fsdp" not in calibration_table


# A process without the package: it cannot be found there.
CHILD = """
import sys
sys.modules["grasp_lightning"] = None
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(12)[None]).logits}, sys.argv[2])
"""


@pytest.mark.slow
def test_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    source, run = save_tiny(tmp_path / "source", num_hidden_layers=6), tmp_path / "run"
    assert main(["compress", *words(source, run, "--method.removed_ratio=0.3")]) == 0
    plan = Plan.from_json((run / "plan.json").read_text())
    select, trained, dropped = plan.operations
    assert isinstance(select, SelectLayers)
    assert isinstance(trained, SetWeights)
    assert isinstance(dropped, DropLayers)
    first = select.layers[0]
    assert select.layers == tuple(range(first, first + 3))
    assert trained.module == f"model.layers.{first}"
    assert dropped.layers == select.layers[1:]

    replayed: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    apply_operations(DecoderView(replayed), plan.operations, load_file(run / "factors.safetensors"))
    deleted: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    apply_operations(DecoderView(deleted), [dropped], {})
    assert not torch.equal(replayed(IDS).logits, deleted(IDS).logits)
    result = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", CHILD, run / "model", result], check=True)
    assert torch.equal(load_file(result)["logits"], replayed(IDS).logits)
    card = (run / "model" / "README.md").read_text()
    last = select.layers[-1]
    assert f"Layer {first} was trained to compute what layers {first} to {last} compute." in card
    report = (run / "report.html").read_text()
    assert "Mean cosine similarity between the input and the output of a span of 3 layers" in report


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_mlp_alone_can_replace_a_span(family: str, tmp_path: Path) -> None:
    source, run = save_tiny(tmp_path / "source", family), tmp_path / "run"
    argv = words(source, run, "--method.replacement=mlp", "--method.num_layers=1")
    assert main(["compress", *argv]) == 0
    plan = Plan.from_json((run / "plan.json").read_text())
    _, removed, trained, _ = plan.operations
    assert isinstance(removed, RemoveBlock)
    assert isinstance(trained, SetWeights)
    assert not any(name.startswith("self_attn.") for name in trained.parameters)
    replayed: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    apply_operations(DecoderView(replayed), plan.operations, load_file(run / "factors.safetensors"))
    found = AutoModelForCausalLM.from_pretrained(run / "model")
    assert has_replaced(found)
    assert torch.equal(found(IDS).logits, replayed(IDS).logits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    source, run = save_tiny(folder / "source"), folder / "run"
    assert main(["compress", *words(source, run, "--method.num_layers=2")]) == 0
    return source, run


def assert_equal_runs(first: Path, second: Path) -> None:
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    left, right = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert not (second / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", KILLS)
def test_a_killed_training_ends_with_the_same_weights(
    place: str, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    source, run = whole
    argv = words(source, tmp_path / "run", "--method.num_layers=2")
    assert killed(KILLS[place], signal.SIGKILL, ["compress", *argv]) == -signal.SIGKILL
    assert main(["compress", *argv]) == 0
    assert_equal_runs(run, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_saves_after_the_step(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = whole
    more = ["--method.num_layers=2", "--trainer.checkpoint_seconds=1000"]
    argv = words(source, tmp_path / "run", *more)
    assert killed(KILLS["inside an epoch"], signal.SIGTERM, ["compress", *argv]) == 143
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    size = count_parameters(tiny_model().model.layers[0])
    kept = [*checkpoint["state_dict"].values(), *checkpoint["grasp_lightning_best"][1]]
    moments = [m for s in checkpoint["optimizer_states"][0]["state"].values() for m in s.values()]
    stored = sum(value.nbytes for value in [*kept, *moments] if value.ndim)
    assert stored == training_bytes(size, 4) - 2 * 4 * size  # without gradients and a cast
    original, steps = SpanModule.training_step, list[int]()

    def counting(module: SpanModule, windows: list[int], batch_idx: int) -> None:
        steps.append(batch_idx)
        original(module, windows, batch_idx)

    monkeypatch.setattr(SpanModule, "training_step", counting)
    assert main(["compress", *argv]) == 0
    assert steps == [5, 6, 7, 8]  # of three epochs with three steps each
    assert_equal_runs(run, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_as_one_does(whole: tuple[Path, Path], tmp_path: Path) -> None:
    source, run = whole
    more = ["--method.num_layers=2", "--trainer.devices=2", "--trainer.strategy=ddp"]
    assert main(["compress", *words(source, tmp_path / "run", *more)]) == 0
    assert (run / "plan.json").read_bytes() == (tmp_path / "run" / "plan.json").read_bytes()
    one, two = (load_file(r / "factors.safetensors") for r in (run, tmp_path / "run"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
