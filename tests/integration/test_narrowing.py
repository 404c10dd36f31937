"""A method that narrows MLPs, from ``compress`` to an ordinary copy of its model."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.cli import main
from grasp_lightning.commands import inputs
from grasp_lightning.config import MethodConfig
from grasp_lightning.methods import predict
from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.prediction import (
    Prediction,
    narrowed_widths,
    outlook_of,
    predict_layers,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import OptionValue, Plan, SelectLayers
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import save_tiny, tiny_model
from tests.unit.models.helpers import meta_model, narrow_layers

IDS = torch.arange(12)[None]
LAYERS = (1, 3)


class Narrowing(CompressionMethod):
    """Keep every other channel of the MLPs of two layers, one step each."""

    name = "narrowing"
    reference = ""

    @property
    def options(self) -> Mapping[str, OptionValue]:
        return {}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        del model
        done = len(plan.channels)
        return Step(name="narrow", layers=LAYERS[done:]) if done < len(LAYERS) else None

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        del stats
        operations, tensors = narrow_layers(model, step.layers[:1], range(0, 48, 2))
        return Decision(operations=(SelectLayers(layers=LAYERS), *operations), tensors=tensors)

    def predict(self, view: DecoderView) -> Prediction:
        operations, _ = narrow_layers(view, LAYERS, range(0, 48, 2))
        return predict_layers(view, LAYERS, len(LAYERS), lambda _: outlook_of(view, (*operations,)))


def narrowing(*_: object) -> CompressionMethod:
    return Narrowing()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_writes_replays_and_exports_narrowed_mlps(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = save_tiny(tmp_path / "source", family), tmp_path / "run"
    monkeypatch.setattr(inputs, "build_method", narrowing)
    windows = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=2", "seqlen=32")
    ]
    words = [f"--model.path={source}", f"--output_dir={run}", "--method.name=grasp"]
    words += ["--method.num_layers=2", "--method.keep_ratio=0.3"]
    assert main(["compress", *words, *windows]) == 0

    decided = Plan.from_json((run / "plan.json").read_text())
    assert list(decided.channels.values()) == [24, 24]
    metrics = json.loads((run / "metrics.json").read_text())
    width = {"dense": 48, "compressed": 24}
    assert metrics["channels"] == dict.fromkeys(decided.channels, width)
    assert "Channels of all 2 narrowed MLPs" in (run / "report.html").read_text()
    assert "2 narrowed MLPs" in (run / "model" / "README.md").read_text()
    stored = load_file(run / "factors.safetensors")
    assert {key: tuple(t.shape) for key, t in stored.items()} == {
        f"{reader}.weight": (32, 24) for reader in decided.channels
    }
    replayed: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    apply_operations(DecoderView(replayed), decided.operations, stored)
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(loaded(IDS).logits, replayed(IDS).logits)
    assert loaded.num_parameters() == metrics["parameters"]["compressed"]
    assert metrics["parameters"]["compressed"] < metrics["parameters"]["dense"]

    assert main(["export", f"--model={run / 'model'}", f"--output_dir={tmp_path / 'out'}"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(dense) is type(tiny_model(family))
    torch.testing.assert_close(dense(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_plan_lists_the_channels_of_narrowed_mlps() -> None:
    view = DecoderView(meta_model("llama"))
    operations, _ = narrow_layers(view, LAYERS, range(20))
    widths = narrowed_widths(view, operations)
    assert widths == {f"model.layers.{layer}.mlp": (20, 48) for layer in LAYERS}
    size = parameters_after(view, operations)
    prediction = predict(view, MethodConfig(name="drop", num_layers=2))
    narrowed = replace(prediction, most=size, least=size, operations=(*operations,), widths=widths)
    assert narrowed.lines[1:] == [
        "2 MLPs are narrowed:",
        "  model.layers.1.mlp: 20 of 48 channels",
        "  model.layers.3.mlp: 20 of 48 channels",
    ]
    assert prediction.widths == {}
    assert prediction.lines[1:] == ["2 layers are deleted"]
