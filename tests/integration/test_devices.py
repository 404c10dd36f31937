"""A GPU would refuse no operation of a run, and no loop over the text waits for it.

No GPU is needed: real tensors on the CPU pose as tensors on one, see ``tests.posing``.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv, compressed_folder
from tests.posing import POSED, MixedDevicesError, Posing, one_gpu

# One wait per batch, each for a number that decides what happens next.
EXPECTED = re.compile(
    r"HiddenStates.__setitem__ \(|"  # host memory has them
    r"find_non_finite \(|"  # stops a run at the first batch that is not finite
    r"CompensationModule.validation_step \(|"  # so does this
    r"in transformers \(|"  # asks whether a batch is packed
    r"TrainerMeasure._run in lightning \("  # logs the loss of each batch
)
GRASP_PLUS = ["--method.name=grasp_plus", "--method.removed_ratio=0.2"]
STREAMED = ["--model.loading=streamed", "--statistics.measured_windows=0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", num_hidden_layers=3)


def waits_of(folder: Path, output: Path, number: int, *keys: str) -> Counter[str]:
    """Compress on the posed device, with some windows of some tokens; return who waited for it."""
    posing = Posing()
    argv = [f"--model.path={folder}", "--model.device=cuda", f"--output_dir={output}", *keys]
    for section in ("calibration", "evaluation"):
        argv += [f"--{section}.source=pydoc", f"--{section}.num_samples={number}"]
        argv += [f"--{section}.seqlen={8 * number}"]
    with posing.active():
        assert main(["compress", *argv]) == 0
    assert posing.waits  # it ran there
    return posing.waits


@pytest.mark.parametrize(
    "keys",
    [
        GRASP_PLUS,
        [*GRASP_PLUS, *STREAMED],
        ["--method.name=grasp", "--method.num_layers=1", "--method.keep_ratio=0.3"],
    ],
    ids=["grasp_plus", "streamed", "grasp"],
)
def test_no_loop_over_windows_or_tokens_waits_for_the_device(
    keys: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(monkeypatch)
    few, many = (waits_of(folder, tmp_path / str(n), n, *keys) for n in (2, 4))
    found = [place for place in many if many[place] > few[place] and not EXPECTED.search(place)]
    assert found == []


@pytest.mark.parametrize(
    "keys",
    [
        ["--method.name=low_rank", "--method.preset=svd_llm", "--method.removed_ratio=0.2"],
        ["--method.name=flap", "--method.removed_ratio=0.2"],
    ],
    ids=["svd_llm", "flap"],
)
def test_no_operation_mixes_devices(
    keys: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(monkeypatch)
    assert waits_of(folder, tmp_path / "run", 2, *keys)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tmp_path_factory.mktemp("compressed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ["--train=lora", "--lora.rank=2"],
        ["--train=factors", "--training.validate_every=1", "--training.keep=best"],
    ],
    ids=["adapters", "factors"],
)
def test_no_operation_of_a_training_mixes_devices(
    keys: list[str], compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(monkeypatch)
    posing = Posing()
    argv = [*compensate_argv(compressed, tmp_path), *keys, "--model.device=cuda"]
    argv += ["--training.max_steps=2", f"--output_dir={tmp_path / 'run'}"]

    with posing.active():
        assert main(["compensate", *argv]) == 0

    assert any("CompensationModule" in place for place in posing.waits)  # the steps ran there


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["instruction", "distill"])
def test_no_micro_batch_of_a_training_waits_for_the_device(
    objective: str, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(monkeypatch)
    found = []
    for size in (4, 1):  # one micro-batch per step, and four
        posing, folder = Posing(), tmp_path / str(size)
        folder.mkdir()
        argv = [*compensate_argv(compressed, folder), "--train=factors", "--model.device=cuda"]
        argv += [f"--objective={objective}", f"--training.micro_batch_size={size}"]
        if objective == "distill":
            argv += [f"--distillation.teacher={compressed}"]
        argv += ["--training.max_steps=2", f"--output_dir={folder / 'run'}"]
        with posing.active():
            assert main(["compensate", *argv]) == 0
        found.append(posing.waits)
    one, four = found
    places = {place for place in four if four[place] > one[place]}
    assert {place for place in places if not EXPECTED.search(place)} == set()


def test_posing_refuses_and_counts_what_a_gpu_would(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch)
    posing = Posing()
    with posing.active():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (here.device.type, there.device, (2 * there[1:]).device) == ("cpu", POSED, POSED)
        assert (there + torch.tensor(1.0)).device == POSED  # as torch allows it
        for wrong in (lambda: here + there, lambda: here.mul_(there), lambda: there[here > 0]):
            with pytest.raises(MixedDevicesError):
                wrong()
        assert not posing.waits
        moved = there.cpu()
        assert moved.device.type == "cpu"
        assert torch.equal(moved, here)
        assert float(there.sum()) == 3
        assert len(there[there > 0]) == 3
        assert sum(posing.waits.values()) == 3
        seen: list[Tensor] = []
        weight = torch.ones(3, device="cuda", requires_grad=True)
        weight.register_hook(lambda grad: seen.append(torch.zeros(3, device=grad.device) + grad))
        (weight * there).sum().backward()
        assert seen[0].device == POSED
