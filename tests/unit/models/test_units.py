"""Removal of key/value groups: units cover every weight once, and removing them masks them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.formats.dense import densify
from grasp_lightning.models.lowrank import config_of, has_replaced
from grasp_lightning.models.plain import make_plain
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.models.units import Units, channel_units, head_units, heads_problem
from grasp_lightning.plan import AddBias, NarrowMlp, Operation, Plan
from tests.conftest import tiny_model
from tests.unit.models.helpers import as_shape, removal

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3"),
    *("gemma2", "gemma3_text", "granite"),
)
FOUR_GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
IDS = torch.arange(97, 109)[None]


def units_of(view: DecoderView, index: int) -> list[Units]:
    found = [head_units(view, index), channel_units(view, index)]
    return [units for units in found if units is not None]


def masked(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """A copy whose output projections read nothing of the groups that are not kept."""
    model = deepcopy(model)
    view = DecoderView(model)
    for index, groups in kept.items():
        units = head_units(view, index)
        assert units is not None
        gone = [group for group in range(units.number) if group not in groups]
        view.linears(index)[units.reader].weight.data[:, units.columns(gone)] = 0
    return model


def cut(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    model = deepcopy(model)
    view = DecoderView(model)
    operations = [removal(view, index, groups) for index, groups in kept.items()]
    size = parameters_after(view, operations)
    apply_operations(view, operations, {})
    assert count_parameters(model) == size
    return model


@torch.no_grad()
def behaviour(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of a padded batch, and what is generated with the cache."""
    batch = IDS.repeat(2, 1)
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    generate: Any = model.generate  # Any: the base class has it only with a head
    return logits[mask.bool()], generate(IDS, max_new_tokens=8, do_sample=False)


def assert_equal(model: PreTrainedModel, other: PreTrainedModel) -> None:
    (logits, text), (expected, other_text) = behaviour(model), behaviour(other)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(text, other_text)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_cover_every_weight_of_their_block_once(family: str) -> None:
    view = DecoderView(tiny_model(family, 0, **FOUR_GROUPS))
    found = units_of(view, 1)
    assert sorted(name for units in found for name in units.linears) == sorted(view.linears(1))
    for units in found:
        everything = range(units.number)
        size = 0
        for name in units.linears:
            rows, columns = as_shape(view, name)
            is_reader = name == units.reader
            taken = [units.columns([i]) if is_reader else units.rows(name, [i]) for i in everything]
            assert sorted(torch.cat(taken).tolist()) == list(range(columns if is_reader else rows))
            bias = view.linears(1)[name].bias
            size += rows * columns + (rows if bias is not None and not is_reader else 0)
        assert units.size * units.number == size
    heads, channels = found
    assert (heads.number, heads.are_heads, channels.number) == (4, True, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_groups_equals_masking_them(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family, 0, **FOUR_GROUPS)
    kept: dict[int, Sequence[int]] = {0: (1, 3), 1: (0,), 3: (0, 2, 3)}
    model = cut(dense, kept)
    assert_equal(model, masked(dense, kept))
    assert_equal(deepcopy(model), model)
    assert rebuild_problem(model) is None
    save_model(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert config_of(loaded).to_dict() == config_of(model).to_dict()
    assert_equal(loaded, model)
    densify(loaded)
    assert not has_replaced(loaded)
    assert_equal(loaded, model)
    assert rebuild_problem(loaded) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_numbers_of_heads_make_an_ordinary_model(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family, 0, **FOUR_GROUPS)
    model = cut(dense, {index: (index % 4, 4 - 1) if index < 3 else (0, 1) for index in range(4)})
    before = deepcopy(model)
    save_model(model, tmp_path)
    assert not has_replaced(model)
    assert_equal(model, before)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert not hasattr(config, "quantization_config")
    assert_equal(type(model).from_pretrained(tmp_path), before)


def test_numbers_that_the_config_refuses_stay_in_our_format() -> None:
    model = cut(tiny_model("llama", 0, **FOUR_GROUPS), dict.fromkeys(range(4), (0, 1, 2)))
    assert not make_plain(model)  # 64 is no multiple of 6 heads
    assert has_replaced(model)


def test_an_added_bias_is_counted_saved_and_refused_by_a_dense_export(tmp_path: Path) -> None:
    model = tiny_model("qwen2", 0, **FOUR_GROUPS)
    view = DecoderView(model)
    channels = channel_units(view, 2)
    assert channels is not None
    narrow = NarrowMlp(reader=channels.reader, writers=channels.writers, channels=tuple(range(9)))
    heads = removal(view, 2, (0, 2))
    operations: list[Operation] = [narrow, heads]
    operations += [AddBias(module=channels.reader), AddBias(module=heads.output)]
    plan = Plan(method="test", operations=tuple(operations))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.heads == {"model.layers.2.self_attn": (2, 4)}
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{name}.bias": torch.randn(64, generator=generator) for name in plan_biases(plan)}
    tensors[f"{channels.reader}.weight"] = torch.randn(64, 9, generator=generator)
    size = parameters_after(view, operations)
    plain = deepcopy(model)
    apply_operations(DecoderView(plain), operations[:2], tensors)
    apply_operations(view, operations, tensors)
    assert count_parameters(model) == size == count_parameters(plain) + 128
    hidden = torch.randn(1, 5, 64, generator=generator)
    torch.testing.assert_close(
        model.model.layers[2].mlp(hidden) - plain.model.layers[2].mlp(hidden),
        tensors[f"{channels.reader}.bias"].expand(1, 5, -1),
    )
    save_model(model, tmp_path)
    assert config_of(model).biases == sorted(plan_biases(plan))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(loaded, model)
    with pytest.raises(ModelError, match="has biases that compression has added, the first in"):
        densify(loaded)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"{channels.reader}.bias"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack \S+down_proj.bias, which compression has added"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def plan_biases(plan: Plan) -> list[str]:
    return [op.module for op in plan.operations if isinstance(op, AddBias)]


def test_other_families_are_named() -> None:
    for family in ("opt", "gpt_neox", "gpt2", "bloom", "falcon"):
        problem = heads_problem(DecoderView(tiny_model(family)), 1)
        assert problem is not None
        assert "attention heads of decoder layer 1" in problem
        assert "families Gemma2, Gemma3, Granite, Llama" in problem


def test_plans_that_do_not_fit_are_refused() -> None:
    view = DecoderView(tiny_model("llama", 0, **FOUR_GROUPS))
    good = removal(view, 1, (0, 2))
    wrong = {
        "keeps 4 key/value groups of .*o_proj: it must keep from 1 to 3": (0, 1, 2, 3),
        "that are not in ascending order": (2, 0),
        "must be from 0 to 3, the plan keeps 0 to 4": (0, 4),
    }
    for message, groups in wrong.items():
        with pytest.raises(PlanError, match=message):
            apply_operations(view, [removal(view, 1, groups)], {})
    with pytest.raises(PlanError, match="expected 8 key/value groups, the model has 4"):
        apply_operations(view, [replace(good, num_groups=8)], {})
    with pytest.raises(PlanError, match="expected all linears of an attention, in their order"):
        apply_operations(view, [replace(good, inputs=good.inputs[::-1])], {})
    with pytest.raises(PlanError, match="expected a linear that it narrows before"):
        apply_operations(view, [AddBias(module=good.output)], {})
    with pytest.raises(PlanError, match=r"removes heads of .* and narrows it, too"):
        apply_operations(view, [good, good], {})
