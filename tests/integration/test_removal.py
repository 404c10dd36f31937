"""Layers and blocks that are removed whole, from ``compress`` to an ordinary copy of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import in_attention
from grasp_lightning.models.lowrank import has_replaced, ranks_of
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import Plan
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv

pytestmark = pytest.mark.slow  # every test runs the program several times

IDS = torch.arange(12)[None]
IDLE_LAYER, IDLE_ATTENTION = 2, 1


def save_with_idle_parts(folder: Path, family: str, **options: int) -> Path:
    """Save a tiny model in which only one layer and one attention block do nothing."""
    source = save_tiny(folder, family, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    view = DecoderView(model)
    with torch.no_grad():
        for index in view.layer_indices:
            for name, linear in view.linears(index).items():
                inside = name.removeprefix(f"{view.layers_name}.{index}.")
                is_idle = index == IDLE_ATTENTION and in_attention(inside)
                size = 0.0 if is_idle or index == IDLE_LAYER else 0.3
                linear.weight.mul_(size / linear.weight.std())
                if linear.bias is not None:
                    linear.bias.mul_(size)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        embedding.weight.mul_(0.5 / embedding.weight.std())
    model.save_pretrained(source)
    return source


def words(source: Path, run: Path, ratio: float, *more: str) -> list[str]:
    texts = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=4", "seqlen=32")
    ]
    given = [f"--model.path={source}", f"--output_dir={run}", f"--method.removed_ratio={ratio}"]
    return [*given, "--method.removable=layers_and_blocks", *texts, *more]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_parts_that_do_nothing_are_removed_whole(family: str, tmp_path: Path) -> None:
    source, run = save_with_idle_parts(tmp_path / "source", family), tmp_path / "run"
    assert main(["compress", *words(source, run, 0.35)]) == 0

    plan = Plan.from_json((run / "plan.json").read_text())
    assert plan.options["removable"] == "layers_and_blocks"
    assert plan.dropped_layers == (IDLE_LAYER,)
    assert [name.rpartition(".")[2] for name in plan.removed_blocks] == ["attention"]
    assert f".{IDLE_ATTENTION}." in plan.removed_blocks[0]
    scores = load_file(run / "scores.safetensors")
    prices = {name: float(value) for name, value in scores.items() if name.endswith(".removal")}
    layers = DecoderView(AutoModelForCausalLM.from_pretrained(source)).num_layers
    assert len(prices) == 3 * layers - 1  # the first layer cannot be removed, its blocks can
    gone = {name for name in prices if f".{IDLE_LAYER}." in name or plan.removed_blocks[0] in name}
    assert max(prices[name] for name in gone) < min(prices[n] for n in prices if n not in gone)

    assert plan.ranks or plan.channels  # removing whole parts is not enough
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0.35 <= metrics["removed_ratio"] < 0.37
    assert "Removed entirely: 2 layers or blocks" in (run / "report.html").read_text()
    assert (
        f"layer {IDLE_LAYER}, the attention of layer {IDLE_ATTENTION}. In total, "
        in (run / "model" / "README.md").read_text()
    )

    replayed: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    apply_operations(DecoderView(replayed), plan.operations, load_file(run / "factors.safetensors"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(loaded(IDS).logits, replayed(IDS).logits)
    assert loaded.num_parameters() == metrics["parameters"]["compressed"]
    generated = [
        loaded.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*generated)

    assert main(["export", f"--model={run / 'model'}", f"--output_dir={tmp_path / 'out'}"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert not has_replaced(dense)
    torch.testing.assert_close(dense(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-5)


def test_prices_are_stored_for_another_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, first = save_with_idle_parts(tmp_path / "source", "llama"), tmp_path / "first"
    assert main(["compress", *words(source, first, 0.25)]) == 0
    again, fresh = tmp_path / "again", tmp_path / "fresh"
    cut = [f"--from_scores={first}", f"--output_dir={again}", "--method.removed_ratio=0.3"]
    assert main(["compress", *cut]) == 0
    assert main(["compress", *words(source, fresh, 0.3)]) == 0
    assert (again / "plan.json").read_bytes() == (fresh / "plan.json").read_bytes()

    plain = tmp_path / "plain"
    assert main(["compress", *words(source, plain, 0.25, "--method.removable=none")]) == 0
    assert Plan.from_json((plain / "plan.json").read_text()).dropped_layers == ()
    capsys.readouterr()
    wanted = [f"--from_scores={plain}", f"--output_dir={tmp_path / 'no'}"]
    assert main(["compress", *wanted, "--method.removable=layers"]) == 2
    assert "has no measured removal of model.layers.1.layer" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_compressed_model_can_lose_parts_as_a_whole(tmp_path: Path) -> None:
    source, first = save_with_idle_parts(tmp_path / "source", "llama"), tmp_path / "first"
    assert main(["compress", *words(source, first, 0.35)]) == 0
    again = words(first / "model", tmp_path / "again", 0.1)
    assert main(["compress", *again]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("train", ["lora", "factors"])
def test_a_model_without_a_block_is_trained(train: str, tmp_path: Path) -> None:
    source = save_with_idle_parts(tmp_path / "source", "llama", max_position_embeddings=256)
    run = tmp_path / "run"
    assert main(["compress", *words(source, run, 0.35)]) == 0
    options = [f"--train={train}", f"--output_dir={tmp_path / 'trained'}"]
    argv = compensate_argv(run / "model", tmp_path)
    assert main(["compensate", *argv, *options]) == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained" / "model")
    assert 0 in ranks_of(trained).values()
