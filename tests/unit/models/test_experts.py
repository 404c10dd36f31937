"""Experts with stacked weights: their layout, and what remains after channels are removed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import (
    experts_layout,
    inner_channels,
    narrowed_experts,
    stacked_reader,
)
from grasp_lightning.models.formats.dense import densify
from grasp_lightning.models.lowrank import GraspQuantizer, config_of
from grasp_lightning.models.mixtures import check_layout, experts_in, routed_tokens
from grasp_lightning.models.operations.narrow_experts import kept_channels, narrow_experts
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import NarrowExperts, Plan
from tests.conftest import STACKED_FAMILIES, tiny_model

IDS = torch.arange(12)[None]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def experts_of(view: DecoderView) -> list[str]:
    return [name for index in view.layer_indices for name in experts_in(view, index)]


def kept_of(width: int, number: int, count: int) -> list[list[int]]:
    """Other channels for every expert."""
    return [sorted((3 * e + 5 * c) % width for c in range(count)) for e in range(number)]


def narrow_all(
    view: DecoderView, count: int, *, zeroed: bool = False
) -> tuple[list[NarrowExperts], dict[str, Tensor]]:
    """Operations that keep some channels of all experts, with unchanged weights.

    ``zeroed`` first sets what reads the other channels to zero, so that nothing is lost.
    """
    operations, tensors = [], {}
    for name in experts_of(view):
        module = view.module(name)
        layout = experts_layout(module)
        assert layout is not None
        operation = narrow_experts(name, kept_of(layout.width, layout.number, count))
        kept, reader = kept_channels(operation), stacked_reader(module, layout)
        if zeroed:
            for expert, channels in enumerate(kept):
                gone = [c for c in range(layout.width) if c not in channels.tolist()]
                reader[expert][:, gone] = 0
        rows = [reader[expert][:, channels] for expert, channels in enumerate(kept)]
        operations.append(operation)
        tensors[f"{name}.down_proj"] = torch.stack(rows).clone()
    return operations, tensors


@pytest.mark.parametrize("family", STACKED_FAMILIES)
def test_one_expert_computed_by_hand_equals_the_module(family: str) -> None:
    view = DecoderView(tiny_model(family))
    name = experts_of(view)[-1]
    module = view.module(name)
    layout = experts_layout(module)
    assert layout is not None
    hidden = torch.randn(5, layout.hidden)
    for expert in range(layout.number):
        index, weights = torch.full((5, 1), expert), torch.rand(5, 1)
        given: tuple[Tensor, ...] = hidden, index, weights
        if layout.is_scaled:
            hidden, weights = weights * hidden, torch.ones(5, 1)
            others = torch.arange(layout.number)[:, None, None] != expert
            given = (hidden.expand(layout.number, -1, -1).masked_fill(others, 0).flatten(0, 1),)
        with torch.no_grad():
            returned = module(*given)
            out = returned.reshape(-1, *hidden.shape).sum(0)
            channels = inner_channels(module, layout, expert, hidden)
            by_hand = channels @ stacked_reader(module, layout)[expert].mT
            if layout.has_bias:
                by_hand += module.get_parameter("down_proj_bias")[expert]
        torch.testing.assert_close(out, weights * by_hand)
        (routed,) = routed_tokens(module, name, given, 1)
        check_layout(name, routed, returned)
        with pytest.raises(ModelError, match=r"usual sum of experts.*set method\.mlp=factors"):
            check_layout(name, routed, 2 * returned)


@pytest.mark.parametrize("family", STACKED_FAMILIES)
def test_removing_channels_that_nothing_reads_leaves_logits(family: str) -> None:
    view = DecoderView(tiny_model(family))
    operations, tensors = narrow_all(view, 8, zeroed=True)
    before, size = logits(view.model), parameters_after(view, operations)
    assert size < count_parameters(view.model)
    apply_operations(view, operations, tensors)
    assert count_parameters(view.model) == size
    assert rebuild_problem(view.model) is None
    torch.testing.assert_close(logits(view.model), before)
    assert set(narrowed_experts(view.model).values()) == {8}
    assert experts_of(view) == []
    with pytest.raises(PlanError, match="or was narrowed already"):
        apply_operations(view, operations, tensors)


@pytest.mark.parametrize("family", STACKED_FAMILIES)
def test_a_saved_model_has_equal_logits_and_generates(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    view = DecoderView(model)
    operations, tensors = narrow_all(view, 8)
    apply_operations(view, operations, tensors)
    before = logits(model)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        save_model(model, folder)
        loaded = type(model).from_pretrained(folder)
        torch.testing.assert_close(logits(loaded), before)
        generate: Any = loaded.generate  # Any: untyped in transformers
        new = [
            generate(IDS, max_new_tokens=5, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*new)
        model = loaded


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mixtral", "intermediate_size"),
        ("qwen2_moe", "moe_intermediate_size"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("olmoe", "intermediate_size"),
        ("gpt_oss", "intermediate_size"),
    ],
)
def test_one_width_gives_an_ordinary_folder(family: str, key: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    apply_operations(DecoderView(model), *narrow_all(DecoderView(model), 8))
    save_model(model, tmp_path)
    assert not (tmp_path / "modeling_grasp.py").exists()
    assert getattr(AutoConfig.from_pretrained(tmp_path), key) == 8
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_layers_of_different_widths_need_our_format(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", moe_intermediate_size=32)
    view = DecoderView(model)
    wide, narrow = narrow_all(view, 16), narrow_all(view, 8)
    apply_operations(
        view,
        [*wide[0][:2], *narrow[0][2:]],
        narrow[1] | {key: value for key, value in wide[1].items() if int(key.split(".")[2]) < 2},
    )
    save_model(model, tmp_path)
    content = AutoConfig.from_pretrained(tmp_path).quantization_config
    widths = content["experts"] if isinstance(content, dict) else content.experts
    assert sorted(widths.values()) == [8, 8, 16, 16]
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_dense_copy_computes_the_same(family: str) -> None:
    model = tiny_model(family)
    size = count_parameters(model)
    apply_operations(DecoderView(model), *narrow_all(DecoderView(model), 8))
    before = logits(model)
    assert len(densify(model)) == 4
    assert count_parameters(model) == size
    assert rebuild_problem(model) is None
    torch.testing.assert_close(logits(model), before)


def test_an_operation_survives_the_plan_file() -> None:
    operation = narrow_experts("model.layers.0.mlp.experts", [[0, 3, 70], [1, 2, 3]])
    plan = Plan(method="m", operations=(operation,))
    assert Plan.from_json(plan.to_json()) == plan
    assert kept_channels(operation).tolist() == [[0, 3, 70], [1, 2, 3]]
    assert plan.channels == {"model.layers.0.mlp.experts": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": "model.layers.0.mlp"}, "not a module of experts with stacked weights"),
        ({"experts": "lm_head"}, "not a module of experts with stacked weights"),
        ({"width": 16}, "keep fewer than 16, and a multiple of 8"),
        ({"width": 7}, "keep fewer than 16, and a multiple of 8"),
        ({"channels": ("1",) * 4}, "with 8 of 16 bits set"),
        ({"channels": ("ff",)}, "keeps channels of 1 experts"),
        ({"channels": ("ff", "ff", "ff", "7x")}, "expert 3 must be a hexadecimal number"),
        ({"channels": ("ff", "ff", "ff", "ff0000")}, "expert 3 must be a hexadecimal number"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    view = DecoderView(tiny_model("qwen3_moe"))
    fields = {"experts": "model.layers.0.mlp.experts", "width": 8, "channels": ("ff",) * 4}
    with pytest.raises(PlanError, match=message):
        parameters_after(view, [NarrowExperts(**{**fields, **change})])  # type: ignore[arg-type]  # of one type each


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("model.layers.0.mlp.experts", 16, "16 channels of .* are not fewer than 16"),
        ("model.layers.0.mlp", 4, "must be experts of a mixture, got Qwen3MoeSparseMoeBlock"),
    ],
)
def test_a_damaged_config_is_refused(name: str, width: int, message: str) -> None:
    model = tiny_model("qwen3_moe")
    config = config_of(model)
    config.experts = {name: width}
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        GraspQuantizer(config).preprocess_model(type(model)(model.config))


def test_other_modules_have_no_layout() -> None:
    model = tiny_model("qwen3_moe")
    found = [name for name, module in model.named_modules() if experts_layout(module)]
    assert found == [f"model.layers.{index}.mlp.experts" for index in range(4)]
    experts = model.get_submodule(found[0])
    experts.register_parameter("scale", nn.Parameter(torch.ones(4)))
    assert experts_layout(experts) is None


def test_kept_channels_ascend() -> None:
    for row in kept_channels(narrow_experts("e", kept_of(48, 4, 7))).tolist():
        assert all(low < high for low, high in pairwise(row))
