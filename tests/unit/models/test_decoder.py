from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.lowrank import LowRankLinear
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, tiny_model
from tests.unit.models.helpers import meta_model

LAYERS = {
    **dict.fromkeys(ALL_FAMILIES, "model.layers"),
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    **dict.fromkeys(["gpt2", "falcon", "falcon_new", "bloom"], "transformer.h"),
}
ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
FUSED = "query_key_value {0}.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
LINEARS = {
    **dict.fromkeys(ALL_FAMILIES, f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "opt": "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj fc1 fc2",
    "gpt_neox": "attention." + FUSED.format("attention"),
    **dict.fromkeys(
        ["falcon", "falcon_new", "bloom"], "self_attention." + FUSED.format("self_attention")
    ),
    "phi3": "self_attn.o_proj self_attn.qkv_proj mlp.gate_up_proj mlp.down_proj",
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    **dict.fromkeys(MOE_FAMILIES, ATTENTION),
}
SKIPPED = {
    **dict.fromkeys(ALL_FAMILIES, ""),
    "mixtral": "mlp.gate mlp.experts",
    "qwen2_moe": "mlp.gate mlp.experts mlp.shared_expert mlp.shared_expert_gate",
    "qwen3_moe": "mlp.experts mlp.gate",
}


def misnumbered() -> PreTrainedModel:
    """A model whose only list of layers has another length than its config says."""
    model = BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, vocab_size=32))
    model.config.num_hidden_layers = 5
    return model


def without_linears() -> PreTrainedModel:
    model = tiny_model()
    model.set_submodule("model.layers", nn.ModuleList(nn.Identity() for _ in range(4)))
    return model


def layer_numbers(view: DecoderView) -> list[set[object]]:
    """The numbers that the modules of each layer hold."""
    return [
        {getattr(module, "layer_idx", None) for module in view.layer(index).modules()} - {None}
        for index in view.layer_indices
    ]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_and_linears_are_found_in_module_order(family: str) -> None:
    model = tiny_model(family)
    view = DecoderView(model)
    assert (view.layers_name, view.num_layers) == (LAYERS[family], 4)
    assert view.layer_indices == (0, 1, 2, 3)
    linears = view.linears(2)
    prefix = f"{LAYERS[family]}.2."
    assert [name.removeprefix(prefix) for name in linears] == LINEARS[family].split()
    assert [*view.dense_modules(2)] == [*linears]
    assert all(model.get_submodule(name) is m for name, m in view.dense_modules(2).items())
    assert view.skipped(2) == tuple(prefix + name for name in SKIPPED[family].split())
    assert view.layer(2) is model.get_submodule(prefix[:-1])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_without_head_has_the_same_layers(family: str) -> None:
    model = tiny_model(family)
    base = model.base_model
    assert isinstance(base, PreTrainedModel)
    view = DecoderView(base)
    assert view.layer(1) is DecoderView(model).layer(1)
    assert f"{base.base_model_prefix}.{view.layers_name}" == LAYERS[family]


def test_factors_of_low_rank_linears_are_not_offered_as_linears() -> None:
    view = DecoderView(tiny_model())
    view.set_module("model.layers.1.mlp.up_proj", LowRankLinear(32, 48, 4))
    assert "model.layers.1.mlp.up_proj" not in view.linears(1)
    assert len(view.linears(1)) == 6


def test_a_model_with_low_rank_linears_only_is_still_a_decoder() -> None:
    view = DecoderView(tiny_model())
    for name in [name for index in range(4) for name in view.linears(index)]:
        view.set_module(name, LowRankLinear(32, 48, 4))
    assert DecoderView(view.model).linears(1) == {}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_names_and_numbers_stay_those_of_the_original_model(family: str) -> None:
    model = tiny_model(family)
    view = DecoderView(model)
    name = next(iter(view.linears(3)))
    kept = view.module(name)
    view.drop([0, 2])
    assert view.layer_indices == (1, 3)
    assert view.num_layers == 4
    assert view.module(name) is kept
    assert view.dense_modules(3)[name] is kept
    assert view.current_name(name) == name.replace(".3.", ".1.", 1)
    assert view.current_name(f"{view.layers_name}.3") == f"{view.layers_name}.1"
    assert view.current_name("lm_head") == "lm_head"
    new = nn.Linear(2, 2)
    view.set_module(name, new)
    assert model.get_submodule(view.current_name(name)) is new
    view.drop([1])
    assert [*view.layer_indices] == [3]
    assert view.module(name) is new


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("make", [tiny_model, meta_model])
def test_dropping_layers_renumbers_modules_and_config(
    family: str, make: Callable[[str], PreTrainedModel]
) -> None:
    model = make(family)
    view = DecoderView(model)
    view.drop([1])
    view.drop([0])
    assert model.config.num_hidden_layers == 2
    assert layer_numbers(view) == [{0}, {1}]


class Skip(nn.Module):
    """A decoder layer that returns its input, in the form that layers of the family return."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.attention_type: Any = getattr(layer, "attention_type", None)
        self.returns_tuple = returns_tuple

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> object:
        return (hidden,) if self.returns_tuple else hidden


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dropping_layers_is_skipping_them(family: str) -> None:
    ids = torch.arange(12).reshape(2, 6)
    skipping, dropping = DecoderView(tiny_model(family)), DecoderView(tiny_model(family))
    outputs: list[object] = []
    handle = skipping.layer(0).register_forward_hook(lambda *values: outputs.append(values[-1]))
    skipping.model(ids)
    handle.remove()
    for index in (0, 2):
        skip = Skip(skipping.layer(index), isinstance(outputs[0], tuple))
        skipping.set_module(f"{skipping.layers_name}.{index}", skip)
    dropping.drop([2, 0])
    expected, actual = (view.model(ids, use_cache=False).logits for view in (skipping, dropping))
    assert torch.equal(actual, expected)


def test_dropping_layers_shortens_lists_with_one_entry_per_layer() -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model(
        "qwen2",
        layer_types=types,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=3,
        eos_token_id=[1, 2, 3, 4],
    )
    model.config.note = (1, 2, 3, 4)
    view = DecoderView(model)
    view.drop([0, 3])
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.note == (2, 3)
    assert model.config.eos_token_id == [1, 2, 3, 4]
    assert model.config.max_window_layers == 3
    model.config.validate()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_cache_of_keys_and_values_works_after_a_drop(family: str) -> None:
    model = tiny_model(family)
    DecoderView(model).drop([0, 2])
    ids = torch.arange(8)[None]
    whole = model(ids, use_cache=False).logits[:, -1]
    first = model(ids[:, :-1], use_cache=True)
    assert len(first.past_key_values) == 2
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda view: view.layer(4), "no decoder layer 4: the model has layers 0 to 3"),
        (lambda view: view.linears(-1), "no decoder layer -1"),
        (
            lambda view: view.layer(1),
            r"decoder layer 1 was dropped; the remaining layers are \[0, 2, 3\]",
        ),
        (lambda view: view.module("model.layers.1.mlp"), "decoder layer 1 was dropped"),
        (
            lambda view: view.module("model.layers.2.nothing"),
            "LlamaForCausalLM has no module model",
        ),
        (lambda view: view.set_module("nothing", nn.Identity()), "has no module nothing"),
        (lambda view: view.drop([0, 1]), "decoder layer 1 was dropped"),
        (lambda view: view.drop([0, 2, 3]), "cannot drop all 3 decoder layers"),
    ],
)
def test_what_is_not_there_is_named(call: Callable[[DecoderView], object], message: str) -> None:
    view = DecoderView(tiny_model())
    view.drop([1])
    with pytest.raises(ModelError, match=message):
        call(view)
    assert view.layer_indices == (0, 2, 3)
    assert view.model.config.num_hidden_layers == 3


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_linear_computes_with_the_weight_that_it_shows(family: str) -> None:
    view = DecoderView(tiny_model(family))
    modules = view.dense_modules(1)
    for name, linear in view.linears(1).items():
        assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
        x = torch.randn(2, 3, linear.in_features)
        expected = nn.functional.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(modules[name](x), expected)
        # A view: what is written there is in the model.
        with torch.no_grad():
            linear.weight.zero_()
        assert not modules[name].weight.any()


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_what_a_mixture_of_experts_keeps_is_named_in_one_warning(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    view = DecoderView(tiny_model(family))
    view.drop([0])
    assert not caplog.messages
    for index in view.layer_indices:
        view.linears(index)
    (message,) = caplog.messages
    assert message.startswith(f"{type(view.model).__name__} is a mixture of experts: ")
    assert ", ".join(SKIPPED[family].split()) in message


def test_dense_layers_next_to_sparse_ones_are_offered_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    view = DecoderView(tiny_model("qwen3_moe", mlp_only_layers=[1]))
    assert len(view.linears(1)) == 7
    assert not caplog.messages
    assert len(view.linears(2)) == 4
    assert "mlp.experts, mlp.gate" in caplog.text


def test_experts_that_are_many_small_linears_are_left_out_with_their_router() -> None:
    model = tiny_model()
    block = nn.Module()
    block.gate = nn.Linear(32, 4)
    block.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    model.set_submodule("model.layers.2.mlp", block)
    model.get_submodule("model.layers.3").add_module("router", nn.Linear(32, 4))
    view = DecoderView(model)
    assert [name.rpartition(".")[2] for name in view.linears(2)] == [
        *("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    assert view.skipped(2) == ("model.layers.2.mlp.gate", "model.layers.2.mlp.experts")
    assert len(view.linears(3)) == 7
    assert view.skipped(3) == ("model.layers.3.router",)


def test_convolutions_are_not_experts() -> None:
    model = tiny_model()
    model.get_submodule("model.layers.2.mlp").add_module("conv", nn.Conv1d(4, 4, 3))
    assert len(DecoderView(model).linears(2)) == 7


def test_lists_of_layer_numbers_follow_a_drop() -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 3, 2])
    view = DecoderView(model)
    view.drop([1])
    assert model.config.mlp_only_layers == [0, 2, 1]


def test_layers_that_compute_with_their_number_cannot_be_dropped() -> None:
    view = DecoderView(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ModelError, match="has scale_attn_by_inverse_layer_idx: its decoder layers"):
        view.drop([1])
    assert view.layer_indices == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            without_linears,
            "LlamaForCausalLM has no linears in its layers",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=2)),
            "T5ForConditionalGeneration has an encoder",
        ),
        (
            misnumbered,
            "BertModel has no list of decoder layers",
        ),
    ],
)
def test_a_family_that_is_not_supported_is_named(
    model: Callable[[], PreTrainedModel], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        DecoderView(model())


def test_frozen_stops_training_gradients_and_caching_inside() -> None:
    model = tiny_model().train()
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model(torch.arange(4)[None]).past_key_values is None


def test_frozen_restores_every_single_state_after_an_exception() -> None:
    model = tiny_model()
    model.get_submodule("model.layers.2").train()
    model.get_submodule("model.layers.1").requires_grad_(False)
    training = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert model.config.use_cache is True
