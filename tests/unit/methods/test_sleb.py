"""The greedy search by loss, against one that deletes layers by hand."""

import pytest
import torch
from transformers import PreTrainedModel

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import MethodConfig
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import DropLayers, Plan
from tests.conftest import tiny_model
from tests.unit.training.test_removal_losses import calibration_data, mean_loss, padded_windows

LAYERS = 7


def searched(family: str, found: TokenWindows, number: int) -> tuple[Plan, DecoderView]:
    view = DecoderView(tiny_model(family, num_hidden_layers=LAYERS))
    config = resolve_method(MethodConfig(name="sleb", num_layers=number))
    method = build_method(config, view)
    plan = Plan(method="sleb", options=method.options)
    measure = TrainerMeasure(calibration_data(found, 2), progress=False)
    return compress(view, method, measure, plan, lambda *_: None), view


def naively_searched(family: str, found: TokenWindows, number: int) -> list[int]:
    """Delete each candidate from a fresh model, every time."""
    gone: list[int] = []
    for _ in range(number):
        alive = [index for index in range(LAYERS) if index not in gone]
        losses = {index: mean_loss(without(family, [*gone, index]), found) for index in alive[1:-1]}
        gone.append(min(losses, key=lambda index: losses[index]))
    return gone


def without(family: str, layers: list[int]) -> PreTrainedModel:
    model = tiny_model(family, num_hidden_layers=LAYERS)
    DecoderView(model).drop(layers)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_deletes_what_a_naive_search_deletes(family: str) -> None:
    found = padded_windows(3)
    plan, view = searched(family, found, 4)
    order = [op.layers[0] for op in plan.operations if isinstance(op, DropLayers)]
    assert order == naively_searched(family, found, 4)
    assert {0, LAYERS - 1} < set(view.layer_indices)
    logits = view.model(input_ids=found.input_ids[1:]).logits
    expected = without(family, order)(input_ids=found.input_ids[1:]).logits
    assert torch.equal(logits, expected)


def test_the_size_is_as_predicted() -> None:
    config = resolve_method(MethodConfig(name="sleb", removed_ratio=0.4))
    view = DecoderView(tiny_model(num_hidden_layers=LAYERS))
    prediction = predict(view, config)
    _, compressed = searched("llama", padded_windows(2), prediction.num_layers)
    assert prediction.most == prediction.least == count_parameters(compressed.model)


def test_layers_that_the_model_needs_are_left_out() -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    view = DecoderView(tiny_model("qwen3_5_text", layer_types=types))
    method = build_method(MethodConfig(name="sleb", num_layers=2), view)
    step = method.next_step(view, Plan(method="sleb"))
    assert step is not None
    assert [part.layer for part in step.needs.removables] == [2]
    with pytest.raises(ConfigError, match=r"delete 2 layers, but it can delete 1 of 4: the first"):
        method.predict(view)
    view.drop([2])
    with pytest.raises(ModelError, match=r"^after 1 of 2 layers, no other can be deleted; lower"):
        method.next_step(view, Plan(method="sleb", operations=(DropLayers(layers=(2,)),)))
