"""Linear maps for deleted layers: from ``compress`` to export, resume and processes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.lowrank import has_replaced, seams
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import AddSeam, Plan, SetWeights
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill

pytestmark = pytest.mark.slow  # every test runs the program several times

IDS = torch.arange(12)[None]
METHODS = {
    "replaceme": ["--method.name=replaceme", "--method.num_layers=2"],
    "drop": ["--method.name=drop", "--method.seam=linear", "--method.layers=[1,3]"],
}


def words(source: Path, run: Path, method: str) -> list[str]:
    texts = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=5", "seqlen=32")
    ]
    # After every batch, so that a kill loses nothing.
    saving = ["--trainer.checkpoint_seconds=0", "--calibration.batch_size=1"]
    return [f"--model.path={source}", f"--output_dir={run}", *METHODS[method], *texts, *saving]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("models") / "source", "qwen2", max_position_embeddings=256
    )


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each method."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in METHODS}
    for name, folder in folders.items():
        assert main(["compress", *words(source, folder, name)]) == 0
    return folders


def test_replaceme_gives_an_ordinary_model(runs: dict[str, Path]) -> None:
    run = runs["replaceme"]
    plan = Plan.from_json((run / "plan.json").read_text())
    (fold,) = [op for op in plan.operations if isinstance(op, SetWeights)]
    assert fold.module == f"model.layers.{plan.dropped_layers[0] - 1}.mlp.down_proj"
    config = json.loads((run / "model" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(config)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert not has_replaced(model)
    factors = load_file(run / "factors.safetensors")
    assert list(factors) == [f"{fold.module}.weight"]
    (key,) = factors
    assert torch.equal(model.get_parameter(key), factors[key])
    assert "Weights before them were changed" in (run / "model" / "README.md").read_text()


def test_seams_count_and_are_named_where_they_matter(runs: dict[str, Path]) -> None:
    run = runs["drop"]
    metrics = json.loads((run / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert len(seams(model)) == 2
    assert metrics["parameters"]["compressed"] == count_parameters(model)
    plan = Plan.from_json((run / "plan.json").read_text())
    assert [op.layers for op in plan.operations if isinstance(op, AddSeam)] == [(1,), (3,)]
    card = (run / "model" / "README.md").read_text()
    assert "2 linear maps correct the hidden states where they were." in card
    assert card.count("not possible: this model has seams") == 3


@pytest.mark.parametrize("form", ["dense", "gguf", "torchao"])
def test_no_other_format_takes_a_model_with_seams(
    form: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = runs["drop"] / "model"
    argv = [f"--model={model}", f"--format={form}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["export", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has seams (linear maps of the hidden states, method.seam=linear)" in error
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on_in_two_processes_to_the_same_maps(
    source: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    argv = ["compress", *words(source, tmp_path / "run", "drop")]
    kill = Kill("grasp_lightning.callbacks.seams", "LayerSeams", "start_batch", 3)
    assert killed(kill, 9, argv) == -9
    done = run_ranks([*argv, "--trainer.devices=2"], 2)
    assert done.codes == [0, 0], done.text
    whole, run = runs["drop"], tmp_path / "run"
    assert (whole / "plan.json").read_bytes() == (run / "plan.json").read_bytes()
    first, second = (load_file(folder / "factors.safetensors") for folder in (whole, run))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-5)


def test_a_second_compression_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = words(runs["drop"] / "model", tmp_path / "again", "replaceme")
    assert main(["compress", *again]) == 2
    assert "has seams from an earlier compression" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_model_with_seams_is_trained(runs: dict[str, Path], tmp_path: Path) -> None:
    argv = compensate_argv(runs["drop"] / "model", tmp_path)
    options = ["--train=lora", f"--output_dir={tmp_path / 'trained'}"]
    assert main(["compensate", *argv, *options]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder / "model")
        for folder in (runs["drop"], tmp_path / "trained")
    )
    assert all(torch.equal(s.weight, seams(after)[n].weight) for n, s in seams(before).items())
    assert not torch.equal(before(IDS).logits, after(IDS).logits)
