"""Which MLPs can be narrowed, and that a narrowed MLP computes with the kept channels only."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import as_linear
from grasp_lightning.models.lowrank import LowRankLinear, narrowed_linears
from grasp_lightning.models.mlp import Mlp, mlps
from grasp_lightning.models.surgery import apply_operations
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, tiny_model
from tests.unit.models.helpers import meta_model, narrow_layers

IDS = torch.arange(12).reshape(2, 6)
DENSE_FAMILIES = tuple(family for family in ALL_FAMILIES if family not in MOE_FAMILIES)
GATED = Mlp("down_proj", ("gate_proj", "up_proj"))
EXPECTED = {
    "opt": ("model.decoder.layers.1.", Mlp("fc2", ("fc1",))),
    "gpt_neox": ("gpt_neox.layers.1.mlp.", Mlp("dense_4h_to_h", ("dense_h_to_4h",))),
    "phi3": ("model.layers.1.mlp.", Mlp("down_proj", ("gate_up_proj",))),
    "gpt2": ("transformer.h.1.mlp.", Mlp("c_proj", ("c_fc",))),
    **{
        family: ("transformer.h.1.mlp.", Mlp("dense_4h_to_h", ("dense_h_to_4h",)))
        for family in ("falcon", "falcon_new", "bloom")
    },
}


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_the_linears_of_an_mlp_are_found_without_weights(family: str) -> None:
    prefix, mlp = EXPECTED.get(family, ("model.layers.1.mlp.", GATED))
    expected = Mlp(prefix + mlp.reader, tuple(prefix + name for name in mlp.writers))
    assert mlps(DecoderView(meta_model(family)), 1) == (expected,)
    assert mlps(DecoderView(tiny_model(family)), 1) == (expected,)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_mixture_of_experts_has_none(family: str) -> None:
    assert mlps(DecoderView(meta_model(family)), 1) == ()


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_a_narrowed_mlp_computes_what_the_kept_channels_do(family: str) -> None:
    zeroed, narrow = DecoderView(tiny_model(family)), DecoderView(tiny_model(family))
    num_channels = as_linear(zeroed.dense_modules(1)[mlps(zeroed, 1)[0].reader]).in_features
    kept = sorted(torch.randperm(num_channels, generator=torch.Generator().manual_seed(0))[:19])
    channels = [int(index) for index in kept]
    operations, tensors = narrow_layers(narrow, (1, 3), channels)
    apply_operations(narrow, operations, tensors)
    removed = [index for index in range(num_channels) if index not in channels]
    for index in (1, 3):
        with torch.no_grad():
            weight = zeroed.linears(index)[mlps(zeroed, index)[0].reader].weight
            weight[:, removed] = 0
    assert narrowed_linears(narrow.model)
    torch.testing.assert_close(
        narrow.model(IDS).logits, zeroed.model(IDS).logits, rtol=1e-4, atol=1e-5
    )


def with_norm(layer: nn.Module) -> None:
    layer.get_submodule("mlp").register_module("norm", nn.RMSNorm(48))


def with_another_linear(layer: nn.Module) -> None:
    layer.get_submodule("mlp").register_module("more", nn.Linear(32, 7))


def with_low_rank_gate(layer: nn.Module) -> None:
    layer.set_submodule("mlp.gate_proj", LowRankLinear(32, 48, 3))


def with_writer_of_other_size(layer: nn.Module) -> None:
    layer.set_submodule("mlp.gate_proj", nn.Linear(32, 47))


def with_writer_elsewhere(layer: nn.Module) -> None:
    layer.register_module("gate_proj", layer.get_submodule("mlp.gate_proj"))
    layer.get_submodule("mlp").register_module("gate_proj", None)


@pytest.mark.parametrize(
    "change",
    [
        with_norm,
        with_another_linear,
        with_low_rank_gate,
        with_writer_of_other_size,
        with_writer_elsewhere,
    ],
)
def test_channels_that_something_else_may_use_are_left_alone(
    change: Callable[[nn.Module], None],
) -> None:
    view = DecoderView(tiny_model())
    change(view.layer(1))
    assert mlps(view, 1) == ()
    assert len(mlps(view, 2)) == 1


def test_as_many_channels_as_hidden_states_are_ambiguous() -> None:
    assert mlps(DecoderView(tiny_model(intermediate_size=32)), 1) == ()


def test_an_mlp_is_narrowed_once() -> None:
    view = DecoderView(tiny_model())
    apply_operations(view, *narrow_layers(view, (1,), range(20)))
    assert [len(mlps(view, index)) for index in range(4)] == [1, 0, 1, 1]
