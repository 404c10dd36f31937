"""Weights of merged layers, and trials that leave no trace."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.merging import merged_for_a_trial
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import DropLayers, MergeLayers, Operation, Plan, TryMerge
from tests.conftest import tiny_model
from tests.unit.models.helpers import factorize_layers

IDS = torch.arange(12)[None]
PAPER = MergeLayers(base=1, absorbed=(2, 3), rule="paper")
RELEASED = MergeLayers(base=1, absorbed=(2, 3), rule="released")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def applied(family: str, operations: Sequence[Operation]) -> PreTrainedModel:
    model = tiny_model(family)
    apply_operations(DecoderView(model), operations, {})
    return model


def with_layer(family: str, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Return the model with other weights in layer 1, and without layers 2 and 3."""
    model = tiny_model(family)
    view = DecoderView(model)
    view.layer(1).load_state_dict(weights, strict=False)
    apply_operations(view, [DropLayers(layers=(2, 3))], {})
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_the_paper_adds_the_differences_of_every_parameter(family: str) -> None:
    view = DecoderView(tiny_model(family))
    layers = [dict(view.layer(index).named_parameters()) for index in (1, 2, 3)]
    for number, layer in enumerate(layers):
        for weight in layer.values():
            if weight.dim() == 1:
                weight.data += 0.1 * number  # norms that differ
    expected = {}
    for name, weight in layers[0].items():
        expected[name] = weight + (layers[1][name] - weight) + (layers[2][name] - weight)
    apply_operations(view, [PAPER], {})
    assert view.layer_indices == (0, 1)
    found = dict(view.layer(1).named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_released_code_keeps_the_linears_of_the_last_layer(family: str) -> None:
    last = DecoderView(tiny_model(family)).layer(3)
    linears = {
        f"{module}.{name}": weight
        for module, linear in last.named_modules()
        if isinstance(linear, nn.Linear | Conv1D)
        for name, weight in linear.named_parameters()
    }
    expected = with_layer(family, linears)
    assert torch.equal(logits(applied(family, [RELEASED])), logits(expected))


def test_one_layer_alone_is_not_changed() -> None:
    for rule in ("paper", "released"):
        alone = Plan.from_json(
            Plan(method="laco", operations=(MergeLayers(base=2, absorbed=(), rule=rule),)).to_json()
        )
        assert torch.equal(logits(applied("llama", alone.operations)), logits(tiny_model()))


def test_a_merge_of_a_merged_layer_takes_its_present_weights() -> None:
    steps = [
        MergeLayers(base=2, absorbed=(3,), rule="paper"),
        MergeLayers(base=1, absorbed=(2,), rule="paper"),
    ]
    model = tiny_model()
    for step in steps:
        apply_operations(DecoderView(model), [step], {})  # numbers of the present model
    together = applied("llama", steps)
    assert torch.equal(logits(together), logits(model))
    assert not torch.equal(logits(together), logits(applied("llama", [PAPER])))
    assert Plan(method="laco", operations=tuple(steps)).merged_layers == {1: (2, 3)}
    dense = DecoderView(tiny_model())
    assert parameters_after(dense, steps) == sum(p.numel() for p in together.parameters())


def test_a_trial_leaves_the_model_as_it_was_even_if_it_fails() -> None:
    def fails(view: DecoderView, merge: MergeLayers, dense: torch.Tensor) -> None:
        with merged_for_a_trial(view, merge):
            assert not torch.equal(logits(view.model), dense)
            raise KeyError

    for family in ("llama", "gpt2"):
        view = DecoderView(tiny_model(family))
        before = {name: value.clone() for name, value in view.model.state_dict().items()}
        for merge in (PAPER, RELEASED):
            with pytest.raises(KeyError):
                fails(view, merge, logits(view.model))
        assert all(torch.equal(before[k], value) for k, value in view.model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "layers 0 and 1 differ in kind or shape"),
        ("qwen3_5_text", "layers 0 and 3 differ in kind or shape"),
        ("mixtral", "layer 0 is a mixture of experts"),
    ],
)
def test_layers_that_do_not_correspond_are_refused(family: str, reason: str) -> None:
    with pytest.raises(PlanError, match=f"^the plan merges decoder layers, but {reason}$"):
        applied(family, [PAPER])


def test_low_rank_layers_are_refused() -> None:
    view = DecoderView(tiny_model())
    apply_operations(view, *factorize_layers(view, (3,), 4))
    with pytest.raises(PlanError, match="but layer 3 has low-rank or narrowed linears"):
        apply_operations(view, [PAPER], {})


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (MergeLayers(base=0, absorbed=(2,), rule="paper"), r"into layer 0, .*by \[1, 2, 3\]"),
        (TryMerge(base=4, absorbed=(), sweep=0), r"into layer 4, the model has \[0, 1, 2, 3\]"),
        (MergeLayers(base=3, absorbed=(2,), rule="paper"), r"followed by \[\]"),
    ],
)
def test_layers_that_do_not_follow_each_other_are_refused(
    operation: Operation, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        applied("llama", [operation])
