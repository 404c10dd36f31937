"""A damaged file of a run is named in one line, with what to do."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_lightning.errors import GraspError, OutputError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods.base import Decision
from grasp_lightning.plan import FactorizeLinear, Plan
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Moments
from grasp_lightning.storage.linear_files import LinearFiles
from grasp_lightning.storage.moments import MomentFiles
from grasp_lightning.storage.passes import PassFiles
from grasp_lightning.storage.progress import RefitLayers, RunProgress
from grasp_lightning.storage.sampled_text import SampledText
from grasp_lightning.storage.tensor_files import save_tensors
from grasp_lightning.storage.training import RunNotes, check_inputs, training_checkpoint
from tests.conftest import tiny_model

PLAN = Plan(method="grasp", inputs={"model": "x"})
BYTES = torch.arange(256)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "run", {})


def add_step(run: RunFolder) -> None:
    progress = RunProgress(run, PLAN)
    done = PLAN.extended((FactorizeLinear(module="a", rank=1, components=None),))
    factors = {"a.left": torch.ones(4, 1), "a.right": torch.ones(1, 4)}
    progress.add_step(done, Decision(operations=done.operations, tensors=factors))


def pass_files(run: RunFolder) -> PassFiles:
    return PassFiles(run, "checkpoints")


def save_pass(run: RunFolder) -> None:
    files = pass_files(run)
    files.load("step")
    files.save({"sum": torch.ones(3), "windows": torch.tensor([0, 1])}, "step")


def save_moments(run: RunFolder) -> None:
    moments = Moments(input_gram=torch.eye(3), input_scale=torch.ones(3))
    MomentFiles(run).save({"a": moments}, "", "step")


def load_moments(run: RunFolder) -> object:
    found = MomentFiles(run).load("", "step")
    return found and found["a"]


def save_linear(files: LinearFiles) -> None:
    files.claim("factorize", ["a"])
    files.save("factorize", "a", {"left": torch.ones(4, 1)})


def load_linear(files: LinearFiles) -> Tensor | None:
    return (
        None if files.missing("factorize", ["a"]) else files.load("factorize", ["a"])["a"]["left"]
    )


def draw(run: RunFolder) -> Tensor:
    text = SampledText(tiny_model, "model", Phases())
    text.keep_in(run)
    return text(3, 8, starts=BYTES, vocabulary=BYTES, seed=0)


TENSORS: dict[str, tuple[Callable[[RunFolder], Any], Callable[[RunFolder], Any]]] = {
    "checkpoints/pass-0-0.safetensors": (save_pass, lambda run: pass_files(run).load("step")),
    "checkpoints/step-000000.safetensors": (add_step, lambda run: RunProgress(run, PLAN)),
    "checkpoints/refit-000002.safetensors": (
        lambda run: RefitLayers(run, "key").save(2, {"a.left": torch.ones(4, 1)}),
        lambda run: RefitLayers(run, "key").load(2),
    ),
    "checkpoints/decided-5f372af1c901bdcbcbfe62f3de7b26bd.safetensors": (
        lambda run: save_linear(LinearFiles(run, "key")),
        lambda run: load_linear(LinearFiles(run, "key")),
    ),
    "statistics.safetensors": (save_moments, load_moments),
    "sampled_text.safetensors": (draw, draw),
}


def change(path: Path, how: Callable[[Tensor], Tensor], *, keeps_metadata: bool = True) -> None:
    """Write the file again, with its tensors changed."""
    with safe_open(path, framework="pt") as content:
        metadata = content.metadata() if keeps_metadata else None
    save_file({name: how(value) for name, value in load_file(path).items()}, path, metadata)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors"),
    "folder": make_folder,
    "link": make_link,
    "other tensors": lambda path: save_file({"x": torch.ones(2)}, path),
    "no metadata": lambda path: change(path, lambda value: value, keeps_metadata=False),
    "shape": lambda path: change(path, lambda value: value[..., :-1].clone()),
    "dtype": lambda path: change(path, lambda value: value.to(torch.float16)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_file_that_is_whole_is_read(name: str, run: RunFolder) -> None:
    write, read = TENSORS[name]
    write(run)
    assert read(run) is not None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", TENSORS)
def test_a_damaged_file_of_tensors_is_named(name: str, damage: str, run: RunFolder) -> None:
    write, read = TENSORS[name]
    write(run)
    DAMAGES[damage](run.root / name)
    assert_is_told(lambda: read(run), run.root / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in TENSORS if "sampled" not in name])
def test_values_that_are_not_finite_are_named(name: str, value: float, run: RunFolder) -> None:
    write, read = TENSORS[name]
    write(run)
    change(run.root / name, lambda t: t * value if t.is_floating_point() else t)
    assert_is_told(lambda: read(run), run.root / name)


def test_text_with_tokens_that_cannot_be_drawn_is_named(run: RunFolder) -> None:
    draw(run)
    change(run.root / "sampled_text.safetensors", lambda ids: ids + 1000)
    assert_is_told(lambda: draw(run), run.root / "sampled_text.safetensors")


def last_checkpoint(run: RunFolder, **changes: object) -> None:
    keys = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
    content = {"state_dict": {"a": torch.ones(2)}, **dict.fromkeys(keys), **changes}
    run.write_with("checkpoints/last.ckpt", lambda path: torch.save(content, path))


TEXTS: dict[str, tuple[Callable[[RunFolder], Any], Callable[[RunFolder], Any]]] = {
    "notes.json": (
        lambda run: RunNotes(run).note("loss", 1.0),
        lambda run: RunNotes(run).noted("loss"),
    ),
    "inputs.json": (
        lambda run: check_inputs(run, {"model": "x"}),
        lambda run: check_inputs(run, {"model": "x"}),
    ),
    "steps.json": (add_step, lambda run: RunProgress(run, PLAN)),
    "last.ckpt": (last_checkpoint, training_checkpoint),
}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[1]", b"7", b'{"loss": "x"}', b"[" * 9999]
)
@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_checkpoint_is_named(name: str, content: bytes, run: RunFolder) -> None:
    write, read = TEXTS[name]
    write(run)
    read(run)
    path = run.root / "checkpoints" / name
    path.write_bytes(content)
    if name == "inputs.json" and content == b'{"loss": "x"}':
        return  # they could be hashes of other inputs
    assert_is_told(lambda: read(run), path)


@pytest.mark.parametrize("damage", ["cut", "not finite", "no state", "a list"])
def test_a_damaged_checkpoint_of_a_training_is_named(damage: str, run: RunFolder) -> None:
    last_checkpoint(run)
    path = run.root / "checkpoints/last.ckpt"
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "not finite":
            last_checkpoint(run, state_dict={"a": torch.tensor([1.0, float("nan")])})
        case "no state":
            torch.save({"state_dict": {}}, path)
        case "a list":
            torch.save([1, 2], path)
    assert_is_told(lambda: training_checkpoint(run), path)


def assert_is_told(read: Callable[[], object], path: Path) -> None:
    with pytest.raises(GraspError) as caught:
        read()
    text = str(caught.value)
    assert text.startswith(f"{path} ")
    assert "; delete " in text or (path.is_symlink() and "; move it" in text)
    assert "\n" not in text


def test_a_step_whose_file_is_deleted_is_done_again(run: RunFolder) -> None:
    add_step(run)
    (run.root / "checkpoints/step-000000.safetensors").unlink()
    progress = RunProgress(run, PLAN)
    assert progress.plan == PLAN
    assert progress.factors == {}


def test_a_state_that_the_run_did_not_write_is_refused(run: RunFolder) -> None:
    (run.root / "checkpoints").mkdir()
    save_tensors(run.root / "checkpoints/pass-0-0.safetensors", {"x": torch.ones(1)}, {"step": "x"})
    with pytest.raises(
        OutputError,
        match=r"pass-0-0\.safetensors already exists and was not written by this program",
    ):
        pass_files(run).load("step")


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.ones(3),
        "a": torch.arange(4),
        "\u00e4": torch.ones(2, dtype=torch.bfloat16),
    }
    metadata = {f"key {number}": json.dumps({'"': "\u00fc\n"}) for number in range(20)}
    written = set()
    for number in range(5):
        save_tensors(tmp_path / f"{number}", tensors, metadata)
        written.add((tmp_path / f"{number}").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0", framework="pt") as content:
        assert content.metadata().items() >= metadata.items()
    found = load_file(tmp_path / "0")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_two_names_of_one_tensor_are_stored(tmp_path: Path) -> None:
    one = torch.ones(4)
    save_tensors(tmp_path / "x", {"a": one, "b": one, "c": one[:2]})
    assert {name: len(value) for name, value in load_file(tmp_path / "x").items()} == {
        "a": 4,
        "b": 4,
        "c": 2,
    }
