from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)

from grasp_lightning.models import lowrank
from grasp_lightning.models.checkpoint import attach_quantizer, foreign_quantizer
from grasp_lightning.models.lowrank import (
    GraspConfig,
    GraspQuantizer,
    LowRankLinear,
    NarrowedLinear,
    config_of,
    has_replaced,
    is_low_rank,
    is_narrowed,
    low_rank_linears,
    narrowed_linears,
    ranks_of,
    shapes_of,
)
from tests.conftest import tiny_model


def test_output_is_left_times_right_times_input_plus_bias() -> None:
    linear = LowRankLinear(6, 5, 2, bias=True, dtype=torch.float64)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = x @ (linear.left.weight @ linear.right.weight).mT + linear.left.bias
    torch.testing.assert_close(linear(x), expected)
    assert (linear.in_features, linear.out_features, linear.rank) == (6, 5, 2)
    assert linear.right.bias is None


def test_without_bias_there_are_two_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in LowRankLinear(6, 5, 2).named_parameters()}
    assert shapes == {"right.weight": (2, 6), "left.weight": (5, 2)}


def test_device_and_dtype_are_those_asked_for() -> None:
    linear = LowRankLinear(6, 5, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in linear.parameters()} == {("meta", torch.bfloat16)}


def test_a_copy_of_the_file_is_recognised_and_leaves_the_registry_alone() -> None:
    copied: dict[str, Any] = {"__name__": "copied"}
    exec(compile(Path(lowrank.__file__).read_text(encoding="utf-8"), "copied.py", "exec"), copied)
    assert copied["LowRankLinear"] is not LowRankLinear
    assert is_low_rank(copied["LowRankLinear"](6, 5, 2))
    assert not is_low_rank(torch.nn.Linear(6, 5))
    assert copied["NarrowedLinear"] is not NarrowedLinear
    assert is_narrowed(copied["NarrowedLinear"](6, 5))
    assert not is_narrowed(torch.nn.Linear(6, 5))
    assert AUTO_QUANTIZER_MAPPING["grasp_lightning"] is GraspQuantizer


def test_transformers_finds_config_and_quantizer_by_name() -> None:
    stored = {"quant_method": "grasp_lightning", "ranks": {"a.b": 3}}
    config = AutoQuantizationConfig.from_dict(stored)
    assert isinstance(config, GraspConfig)
    assert config.to_dict() == stored
    quantizer = AutoHfQuantizer.from_config(config)
    assert isinstance(quantizer, GraspQuantizer)
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable


@pytest.mark.parametrize("rank", [-1, 2.0, "3", True, None])
def test_a_rank_that_is_not_an_integer_of_at_least_0_is_named(rank: object) -> None:
    with pytest.raises(ValueError, match=r"rank of a\.b must be an integer of at least 0, got"):
        GraspConfig({"a.b": rank})  # type: ignore[dict-item]  # what a config.json may hold


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_of_rank_0_gives_its_bias_alone(*, bias: bool) -> None:
    linear = LowRankLinear(6, 5, 0, bias=bias)
    given = torch.randn(2, 3, 6, requires_grad=True)
    expected = linear.left.bias if bias else torch.zeros(5)
    assert torch.equal(linear(given), expected.expand(2, 3, 5))
    assert [name for name, _ in linear.named_parameters()] == ["left.bias"] * bias
    assert {"right.weight", "left.weight"} <= linear.state_dict().keys()
    linear(given).sum().backward()
    assert given.grad is not None
    assert not given.grad.any()


def test_keys_of_a_newer_format_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['scales'\].*newer version"):
        AutoQuantizationConfig.from_dict({"quant_method": "grasp_lightning", "scales": {}})


def test_ranks_are_listed_under_full_names_in_sorted_order() -> None:
    model = tiny_model()
    for name, rank in (("model.layers.2.mlp.up_proj", 3), ("model.layers.0.mlp.up_proj", 4)):
        model.set_submodule(name, LowRankLinear(32, 48, rank))
    assert list(ranks_of(model).items()) == [
        ("model.layers.0.mlp.up_proj", 4),
        ("model.layers.2.mlp.up_proj", 3),
    ]
    assert list(low_rank_linears(model)) == list(ranks_of(model))


def test_attaching_follows_the_low_rank_linears_that_are_there() -> None:
    model = tiny_model()
    attach_quantizer(model)
    assert getattr(model, "hf_quantizer", None) is None
    dense = model.get_submodule("model.layers.0.mlp.up_proj")
    model.set_submodule("model.layers.0.mlp.up_proj", LowRankLinear(32, 48, 4))
    attach_quantizer(model)
    assert model.config.quantization_config.ranks == {"model.layers.0.mlp.up_proj": 4}
    assert foreign_quantizer(model) is None
    model.set_submodule("model.layers.0.mlp.up_proj", dense)
    attach_quantizer(model)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")


def test_another_quantization_method_is_named() -> None:
    model = tiny_model()
    assert foreign_quantizer(model) is None
    model.config.quantization_config = {"quant_method": "gptq"}
    assert foreign_quantizer(model) == "gptq"


def test_initialisation_is_skipped_for_factors_alone() -> None:
    model: Any = tiny_model("gpt2")  # Any: attributes that transformers sets
    for module in model.modules():
        module._is_hf_initialized = False
    ranks = {f"transformer.h.{index}.mlp.c_proj": 3 for index in (1, 2)}
    GraspQuantizer(GraspConfig(ranks)).preprocess_model(model)
    skipped = {name for name, m in model.named_modules() if getattr(m, "_is_hf_initialized", 0)}
    assert skipped == {f"{module}.{factor}" for module in ranks for factor in ("left", "right")}


UP = "model.layers.0.mlp.up_proj"


def test_shapes_of_narrowed_linears_stand_in_the_config_only_where_there_are_some() -> None:
    model = tiny_model()
    assert not has_replaced(model)
    model.set_submodule(UP, NarrowedLinear(32, 20, bias=False))
    assert has_replaced(model)
    assert list(narrowed_linears(model)) == [UP]
    assert shapes_of(model) == {UP: (20, 32)}
    stored = {"quant_method": "grasp_lightning", "ranks": {}, "shapes": {UP: [20, 32]}}
    assert config_of(model).to_dict() == stored
    config = AutoQuantizationConfig.from_dict(stored)
    assert isinstance(config, GraspConfig)
    assert config.to_dict() == stored
    assert "shapes" not in GraspConfig({"a": 3}).to_dict()
    attach_quantizer(model)
    assert model.config.quantization_config.shapes == {UP: [20, 32]}


@pytest.mark.parametrize("shape", [[3], [3, 0], [3, 2.0], [3, True], [3, 4, 5], 3, "34", None])
def test_a_shape_that_is_not_a_pair_of_positive_integers_is_named(shape: object) -> None:
    with pytest.raises(ValueError, match=r"shape of a\.b must be two positive integers, got"):
        GraspConfig(shapes={"a.b": shape})  # type: ignore[dict-item]  # what config.json may hold


def test_a_linear_has_a_rank_or_a_shape() -> None:
    with pytest.raises(ValueError, match=r"a\.b has both a rank and a shape"):
        GraspConfig({"a.b": 3}, shapes={"a.b": [3, 4]})


@pytest.mark.parametrize("shape", [[48, 32], [49, 31], [47, 33], [32, 48]])
def test_a_shape_that_is_not_smaller_is_refused(shape: list[int]) -> None:
    quantizer = GraspQuantizer(GraspConfig(shapes={UP: shape}))
    with pytest.raises(ValueError, match=f"of {UP} is not smaller than that of a linear of 48 x 3"):
        quantizer.preprocess_model(tiny_model())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_narrowed_linear_takes_the_place_of_each_kind_of_linear(family: str) -> None:
    name = {"llama": UP, "gpt2": "transformer.h.1.mlp.c_fc"}[family]
    model = tiny_model(family)
    GraspQuantizer(GraspConfig(shapes={name: [20, 32]})).preprocess_model(model)
    linear = narrowed_linears(model)[name]
    assert (linear.weight.shape, linear.weight.is_meta) == ((20, 32), True)
    assert (linear.bias is not None) == (family == "gpt2")
