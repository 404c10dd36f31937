"""Mixtures that lose experts, with the rows of their routers, and the plans that are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.errors import PlanError
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import Mixture, numbered_experts
from grasp_lightning.models.experts import stacked_reader
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.operations.narrow_experts import narrow_experts
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import DropLayers, Operation, Plan, RemoveExperts
from tests.conftest import STACKED_FAMILIES, TINY_CONFIGS, tiny_model

IDS = torch.arange(12)[None]
# Of two groups of four, each loses one: other experts in each layer.
GONE = ((0, 5), (3, 4), (1, 7), (2, 6))
ROUTER_BIASES = {
    "gpt_oss": "router.bias",
    "deepseek_v3": "gate.e_score_correction_bias",
    "glm4_moe": "gate.e_score_correction_bias",
}


def eight_experts(family: str) -> PreTrainedModel:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    (key,) = TINY_CONFIGS[family].keys() & {*names}
    return tiny_model(family, **{key: 8})


def mixtures(view: DecoderView) -> list[Mixture]:
    found = numbered_experts(view)
    assert found is not None
    return list(found.mixtures.values())


def removals(view: DecoderView) -> list[RemoveExperts]:
    return [
        RemoveExperts(
            mixture=mixture.name,
            experts=mixture.experts,
            kept=tuple(sorted({*range(8)} - {*GONE[view.layer_of(mixture.name) or 0]})),
            num_experts=8,
        )
        for mixture in mixtures(view)
    ]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", STACKED_FAMILIES)
def test_a_model_with_fewer_experts_is_an_ordinary_one(family: str, tmp_path: Path) -> None:
    model = eight_experts(family)
    view = DecoderView(model)
    operations, dense = removals(view), dict(model.state_dict())
    layers = {view.layer_of(operation.mixture) for operation in operations}
    assert len(layers) == view.num_layers - (family in ("deepseek_v3", "glm4_moe"))
    size = parameters_after(view, operations)
    apply_operations(view, operations, {})
    assert count_parameters(model) == size < sum(t.numel() for t in dense.values())
    assert rebuild_problem(model) is None
    assert not has_replaced(model)
    for name, tensor in model.state_dict().items():
        kept = next((op.kept for op in operations if name.startswith(f"{op.mixture}.")), ())
        expected = dense[name] if tensor.shape == dense[name].shape else dense[name][[*kept]]
        assert torch.equal(tensor, expected), name
    save_model(model, tmp_path)
    assert not (tmp_path / "modeling_grasp.py").exists()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    new = [loaded.generate(IDS, max_new_tokens=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*new)


@pytest.mark.parametrize("family", ROUTER_BIASES)
def test_experts_that_no_token_gets_can_go_without_a_change(family: str) -> None:
    model = eight_experts(family)
    view = DecoderView(model)
    for mixture in mixtures(view):
        bias = view.module(mixture.name).state_dict()[ROUTER_BIASES[family]]
        bias[[*GONE[view.layer_of(mixture.name) or 0]]] = -1e4
    before = logits(model)
    apply_operations(view, removals(view), {})
    torch.testing.assert_close(logits(model), before)


def test_experts_are_removed_and_the_others_narrowed_in_one_plan(tmp_path: Path) -> None:
    view = DecoderView(eight_experts("qwen3_moe"))
    operations: list[Operation] = [DropLayers(layers=(1,))]
    operations += [op for op in removals(view) if view.layer_of(op.mixture) != 1]
    narrowed = [op for op in operations if isinstance(op, RemoveExperts)][1:]
    tensors: dict[str, Tensor] = {}
    for op in narrowed:
        mixture = next(x for x in mixtures(view) if x.experts == op.experts)
        reader = stacked_reader(view.module(op.experts), mixture.layout)
        tensors[f"{op.experts}.down_proj"] = reader[[*op.kept]][..., 3:11].clone()
        operations.append(narrow_experts(op.experts, [range(3, 11)] * len(op.kept)))
    plan = Plan(method="any", operations=tuple(operations))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.experts == {
        op.mixture: (6, 8) for op in operations if isinstance(op, RemoveExperts)
    }
    size = parameters_after(view, operations)
    apply_operations(view, operations, tensors)
    assert count_parameters(view.model) == size
    save_model(view.model, tmp_path)
    loaded = type(view.model).from_pretrained(tmp_path)
    assert loaded.config.num_experts == 6
    assert torch.equal(logits(loaded), logits(view.model))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (range(6), "equally many of each group of 4"),
        ((0, 1, 4), "at least 4 of them, and a multiple of 2"),
        ((0, 4), "at least 4 of them, and a multiple of 2"),
        (range(8), "expected ascending numbers below 8"),
        ((0, 1, 2, 4, 5, 9), "expected ascending numbers below 8"),
        ((1, 0, 2, 4, 5, 6), "expected ascending numbers below 8"),
    ],
)
def test_a_choice_that_the_router_cannot_make_is_refused(
    kept: tuple[int, ...], message: str
) -> None:
    view = DecoderView(eight_experts("deepseek_v3"))
    operations = [replace(op, kept=tuple(kept)) for op in removals(view)]
    before = logits(view.model)
    with pytest.raises(PlanError, match=message):
        apply_operations(view, operations, {})
    assert torch.equal(logits(view.model), before)


def test_layers_need_one_number_and_a_mixture() -> None:
    view = DecoderView(eight_experts("mixtral"))
    first, *others = removals(view)
    with pytest.raises(PlanError, match="leaves mixtures with 6 and with 8 experts"):
        apply_operations(view, [first], {})
    with pytest.raises(PlanError, match="twice"):
        apply_operations(view, [first, first, *others], {})
    with pytest.raises(PlanError, match="after dropping its decoder layer"):
        apply_operations(view, [DropLayers(layers=(0,)), first, *others], {})
    attention = replace(first, mixture="model.layers.0.self_attn")
    with pytest.raises(PlanError, match="not a mixture whose number of experts the config says"):
        apply_operations(view, [attention], {})
    with pytest.raises(PlanError, match="with 9 experts, the model has 8"):
        apply_operations(view, [replace(first, num_experts=9), *others], {})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("mixtral", {"num_experts_per_tok": 4}),  # all of them
        ("deepseek_v3", {"n_routed_experts": 4}),  # two groups of two, whose scores need two
    ],
)
def test_what_cannot_lose_experts_has_none_to_remove(
    family: str, overrides: dict[str, int]
) -> None:
    assert numbered_experts(DecoderView(tiny_model(family, 0, **overrides))) is None
