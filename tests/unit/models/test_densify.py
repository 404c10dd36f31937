from collections.abc import Iterable, Sequence
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.config import ExportConfig
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.formats import FORMATS
from grasp_lightning.models.formats.dense import densify
from grasp_lightning.models.lowrank import NarrowedLinear, low_rank_linears, narrowed_linears
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Operation
from tests.conftest import ALL_FAMILIES, tiny_model
from tests.unit.models.helpers import factorize_layers, in_dtype, meta_model, narrow_layers

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(12).reshape(2, 6)


def compressed(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    more: Sequence[Operation] = (),
) -> PreTrainedModel:
    """A model whose layers 1 and 3 have linears of rank 3."""
    view = DecoderView(in_dtype(tiny_model(family), dtype))
    operations, tensors = factorize_layers(view, (1, 3), rank=3)
    apply_operations(view, [*operations, *more], tensors)
    return view.model


def linear(model: PreTrainedModel, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert type(module) is nn.Linear
    return module


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_dense_model_computes_what_the_low_rank_one_does(family: str) -> None:
    model, original = compressed(family), tiny_model(family)
    logits = model(IDS).logits
    names = tuple(low_rank_linears(model))
    assert densify(model) == names
    assert not low_rank_linears(model)
    for name in names:
        assert type(model.get_submodule(name)) is type(original.get_submodule(name))
    difference = (model(IDS).logits - logits).abs().max()
    assert difference <= 1e-4 * logits.abs().max()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_dense_model_has_the_structure_of_the_original(family: str) -> None:
    model, original = compressed(family), tiny_model(family)
    densify(model)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, original)]
    assert shapes[0] == shapes[1]
    assert count_parameters(model) == count_parameters(original)  # tied ones counted once
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None


def test_dropped_layers_stay_dropped() -> None:
    model = compressed(more=[DropLayers(layers=(0,))])
    logits = model(IDS).logits
    names = densify(model)
    # Layers 1 and 3 have moved up.
    assert {name.split(".")[2] for name in names} == {"0", "2"}
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    layer = sum(p.numel() for p in tiny_model().get_submodule("model.layers.0").parameters())
    assert count_parameters(model) == count_parameters(tiny_model()) - layer


def test_biases_are_kept_unchanged() -> None:
    model = compressed("opt")
    before = {name: module.left.bias for name, module in low_rank_linears(model).items()}
    assert all(bias is not None for bias in before.values())
    densify(model)
    assert all(linear(model, name).bias is bias for name, bias in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_product_is_rounded_once_to_the_dtype_of_the_factors(dtype: torch.dtype) -> None:
    model = compressed(dtype=dtype)
    factors = low_rank_linears(model)[UP]
    exact = factors.left.weight.double() @ factors.right.weight.double()
    densify(model)
    weight = linear(model, UP).weight
    assert weight.dtype == dtype
    assert weight.is_contiguous()
    # Half a unit in the last place, plus the error of the sum before.
    lost = 1e-14 if dtype == torch.float64 else 1e-7
    error = (weight.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps * 0.51 + lost).all()


def test_a_transposed_weight_gets_back_into_its_own_layout() -> None:
    name = "transformer.h.1.mlp.c_fc"
    model = compressed("gpt2")
    factors = low_rank_linears(model)[name]
    product, bias = factors.left.weight @ factors.right.weight, factors.left.bias
    assert product.shape == (48, 32)
    densify(model)
    new = model.get_submodule(name)
    assert isinstance(new, Conv1D)
    torch.testing.assert_close(new.weight, product.mT)
    assert new.weight.is_contiguous()
    assert new.bias is bias


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_state_is_that_of_the_factors(training: bool, requires_grad: bool) -> None:
    model = compressed()
    low_rank_linears(model)[UP].train(training).requires_grad_(requires_grad)
    densify(model)
    new = linear(model, UP)
    assert new.training is training
    assert new.weight.requires_grad is requires_grad
    assert new.weight.is_leaf


def test_an_overflow_names_the_linear_and_changes_nothing() -> None:
    model = compressed(dtype=torch.float16)
    factors = low_rank_linears(model)
    with torch.no_grad():
        factors[UP].left.weight.fill_(300)
        factors[UP].right.weight.fill_(300)
    with pytest.raises(NumericsError, match=rf"factors of {UP} is not finite in torch.float16"):
        densify(model)
    assert low_rank_linears(model) == factors
    assert set(model.config.quantization_config.ranks) == set(factors)


def test_a_model_without_factors_is_refused() -> None:
    with pytest.raises(
        ModelError, match="LlamaForCausalLM has neither low-rank nor narrowed linears"
    ):
        densify(tiny_model())


def test_the_meta_device_gives_the_sizes_and_no_random_numbers_are_drawn() -> None:
    view = DecoderView(meta_model("qwen2"))
    operations, tensors = factorize_layers(DecoderView(tiny_model("qwen2")), (1,), rank=3)
    apply_operations(view, operations, tensors)
    before = torch.get_rng_state()
    densify(view.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert count_parameters(view.model) == count_parameters(tiny_model("qwen2"))
    assert {parameter.device.type for parameter in view.model.parameters()} == {"meta"}


def test_progress_sees_every_linear() -> None:
    model = compressed()
    seen: list[str] = []

    def track(names: Sequence[str]) -> Iterable[str]:
        seen.extend(names)
        return names

    assert densify(model, track) == tuple(seen)
    assert len(seen) == 14


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_narrowed_model_computes_the_same_when_it_is_filled_up(family: str) -> None:
    original = tiny_model(family)
    model = compressed(family, more=[DropLayers(layers=(3,))])
    apply_operations(DecoderView(model), *narrow_layers(DecoderView(model), (0, 2), (3, 5, 40)))
    logits = model(IDS).logits
    replaced = sorted({*low_rank_linears(model), *narrowed_linears(model)})
    assert densify(model) == tuple(replaced)
    assert not narrowed_linears(model)
    for name in replaced:
        assert type(model.get_submodule(name)) is type(original.get_submodule(name))
    shapes = {k: v.shape for k, v in original.state_dict().items()}
    assert all(shapes[key] == value.shape for key, value in model.state_dict().items())
    difference = (model(IDS).logits - logits).abs().max()
    assert difference <= 1e-4 * logits.abs().max()
    assert not hasattr(model.config, "quantization_config")


def test_each_part_of_a_fused_linear_is_filled_up_with_zeros() -> None:
    view = DecoderView(tiny_model("phi3"))
    old = linear(view.model, "model.layers.1.mlp.gate_up_proj").weight.detach()
    apply_operations(view, *narrow_layers(view, (1,), (3, 5)))
    densify(view.model)
    new = linear(view.model, "model.layers.1.mlp.gate_up_proj").weight
    assert new.shape == (96, 32)
    assert torch.equal(new[[0, 1, 48, 49]], old[[3, 5, 51, 53]])
    assert new.count_nonzero() == old[[3, 5, 51, 53]].count_nonzero()
    down = linear(view.model, "model.layers.1.mlp.down_proj").weight
    assert not down[:, 2:].any()


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_biases_are_filled_up_with_zeros_and_that_of_the_reader_is_kept(family: str) -> None:
    view = DecoderView(tiny_model(family))
    apply_operations(view, *narrow_layers(view, (1,), (3, 5)))
    narrowed = narrowed_linears(view.model)
    biases = {name: module.bias for name, module in narrowed.items()}
    densify(view.model)
    for name, bias in biases.items():
        new = view.model.get_parameter(f"{name}.bias")
        if len(bias) == 32:
            assert new is bias
        else:
            assert torch.equal(new[:2], bias)
            assert not new[2:].any()


def test_a_narrowed_linear_without_a_reader_in_its_module_is_named() -> None:
    model = tiny_model()
    model.set_submodule(UP, NarrowedLinear(32, 20, bias=False))
    with pytest.raises(
        ModelError, match=f"{UP} has 20 of 48 outputs, but no linear in the same module"
    ):
        densify(model)
    assert list(narrowed_linears(model)) == [UP]


def test_every_format_that_the_command_takes_is_in_the_table() -> None:
    assert tuple(FORMATS) == get_args(get_type_hints(ExportConfig)["format"])
