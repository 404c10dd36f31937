"""Methods that truncate in a measured metric, in two processes and after a kill."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.plan import Plan
from tests.integration.forked import run_ranks
from tests.integration.killing import Kill
from tests.integration.test_processes import assert_success
from tests.integration.test_removal import save_with_idle_parts

pytestmark = pytest.mark.slow  # every process imports torch and transformers

TWO = "--trainer.devices=2"
STRATEGIES = {"ddp": [TWO], "fsdp": [TWO, "--trainer.strategy=fsdp"]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_with_idle_parts(tmp_path_factory.mktemp('model') / 'tiny', 'llama')}",
        "--method.name=grasp_plus",
        "--method.removed_ratio=0.35",
        "--method.removable=layers_and_blocks",
        "--calibration.source=pydoc",
        "--calibration.num_samples=5",  # odd: one process has a window more
        "--calibration.seqlen=48",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=3",
        "--evaluation.seqlen=48",
        "--trainer.checkpoint_seconds=0",
    ]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["compress", *settings, f"--output_dir={folder}"]) == 0
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert plan.ranks
    assert plan.channels
    assert plan.removed_blocks
    assert plan.dropped_layers
    return folder


def assert_equal_decisions(first: Path, second: Path) -> None:
    """Plans are equal; losses and factors differ only as float32 sums in another order do."""
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    for name in ("scores.safetensors", "statistics.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        for key, values in left.items():
            scale = float(values.abs().max())
            # A divergence is a small difference of terms as large as the loss itself.
            is_divergence = key.endswith((".measured", ".removal"))
            rtol, atol = (1e-2, 1e-6) if is_divergence else (1e-5, 1e-5 * scale)
            torch.testing.assert_close(right[key], values, rtol=rtol, atol=atol, msg=key)
    weights, others = (replaced_weights(folder) for folder in (first, second))
    assert weights.keys() == others.keys()
    for key, values in weights.items():
        scale = float(values.abs().max())
        torch.testing.assert_close(others[key], values, rtol=0, atol=1e-3 * scale, msg=key)
    assert not (second / "checkpoints").exists()


def replaced_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the products of factors, whose signs are free, and the weights that were fitted."""
    stored = load_file(folder / "factors.safetensors")
    lefts = {key.removesuffix(".left"): key for key in stored if key.endswith(".left")}
    products = {name: stored[key] @ stored[f"{name}.right"] for name, key in lefts.items()}
    fitted = {key: value for key, value in stored.items() if key.endswith(".weight")}
    assert fitted
    return products | fitted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_decide_as_one_does(
    strategy: str, settings: list[str], alone: Path, tmp_path: Path
) -> None:
    argv = ["compress", *settings, *STRATEGIES[strategy], f"--output_dir={tmp_path / 'run'}"]
    assert_success(argv, 2)
    assert_equal_decisions(alone, tmp_path / "run")


@pytest.mark.parametrize(("strategy", "later"), [("ddp", []), ("fsdp", STRATEGIES["fsdp"])])
def test_killed_processes_go_on_to_the_same_decisions(
    strategy: str, later: list[str], settings: list[str], alone: Path, tmp_path: Path
) -> None:
    module = "grasp_lightning.training.calibration"
    where = Kill(module, "CalibrationModule", "training_step", 2)
    argv = ["compress", *settings, f"--output_dir={tmp_path / 'run'}"]
    both = run_ranks([*argv, *STRATEGIES[strategy]], 2, where)
    assert both.codes == [-signal.SIGKILL] * 2, both.text
    saved = [
        load_file(file)["windows"].tolist()
        for file in (tmp_path / "run" / "checkpoints").glob("pass-*")
    ]
    assert sorted(map(len, saved)) == [1, 1]  # each had counted one window
    assert saved[0] != saved[1]
    assert_success([*argv, *later], 2 if later else 1)
    assert_equal_decisions(alone, tmp_path / "run")


def test_a_refit_of_all_linears_in_two_processes_is_that_of_one(
    settings: list[str], alone: Path, tmp_path: Path
) -> None:
    words = [*settings, f"--from_scores={alone}", "--method.refit=prefix"]
    assert main(["compress", *words, f"--output_dir={tmp_path / 'one'}"]) == 0
    assert_success(["compress", *words, TWO, f"--output_dir={tmp_path / 'two'}"], 2)
    first, second = (replaced_weights(tmp_path / name) for name in ("one", "two"))
    for key, values in first.items():
        scale = float(values.abs().max())
        torch.testing.assert_close(second[key], values, rtol=0, atol=1e-3 * scale, msg=key)
