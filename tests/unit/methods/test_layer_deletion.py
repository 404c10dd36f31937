"""Methods that delete whole layers: by block influence, and at random."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import tiny_model
from tests.unit.models.test_calls import gemma4

SIMILARITY = torch.tensor([0.2, 0.9, 0.5, 0.9])


def deleted(config: MethodConfig, view: DecoderView | None = None, seed: int = 0) -> Plan:
    def measure(view: DecoderView, step: Step) -> Statistics:
        assert len(view.layer_indices) == len(SIMILARITY)
        return Statistics(layer_metric=None if step.needs.is_empty else SIMILARITY)

    view = view or DecoderView(tiny_model())
    method = build_method(resolve_method(config, seed), view)
    plan = Plan(method=method.name, options=method.options)
    return compress(view, method, measure, plan, lambda *_: None)


@pytest.mark.parametrize("amount", [MethodConfig(num_layers=3), MethodConfig(removed_ratio=0.3)])
def test_shortgpt_deletes_what_drop_deletes_by_similarity(amount: MethodConfig) -> None:
    shortgpt = deleted(replace(amount, name="shortgpt"))
    drop = deleted(replace(amount, name="drop", layer_metric="similarity"))
    assert shortgpt.operations == drop.operations
    assert shortgpt.options == drop.options
    once = resolve_method(replace(amount, name="shortgpt"))
    assert resolve_method(once) == once


def test_random_draws_by_seed_and_records_it() -> None:
    config = MethodConfig(name="random", num_layers=2)
    plans = [deleted(config, seed=seed) for seed in range(60)]
    assert deleted(config, seed=3) == plans[3] == deleted(replace(config, layer_seed=3), seed=7)
    assert [plan.options["layer_seed"] for plan in plans] == list(range(60))
    counts = Counter(index for plan in plans for index in plan.dropped_layers)
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 15  # 30 expected of 60 draws of two of four layers
    for seed, plan in enumerate(plans):
        more = deleted(replace(config, num_layers=3), seed=seed)
        assert set(plan.dropped_layers) < set(more.dropped_layers)
    once = resolve_method(config, seed=5)
    assert resolve_method(once, seed=6) == once


def test_random_never_draws_the_last_layer_of_a_kind() -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    config = MethodConfig(name="random", num_layers=2)
    drawn = [
        deleted(config, DecoderView(tiny_model("qwen3_5_text", layer_types=types)), seed)
        for seed in range(9)
    ]
    assert {index for plan in drawn for index in plan.dropped_layers} == {0, 2, 3}


def test_random_refuses_a_number_that_cannot_be_deleted() -> None:
    view = DecoderView(gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8))
    method = build_method(resolve_method(MethodConfig(name="random", num_layers=3)), view)
    with pytest.raises(ModelError, match=r"^fewer than 3 layers can be deleted together; lower"):
        method.decide(Step(name="select"), view, Statistics())


@pytest.mark.parametrize("name", ["shortgpt", "random"])
def test_the_number_of_layers_comes_nearest_to_the_share(name: str) -> None:
    view = DecoderView(tiny_model())
    found = predict(view, resolve_method(MethodConfig(name=name, removed_ratio=0.3)))
    assert found == predict(view, resolve_method(MethodConfig(name="drop", removed_ratio=0.3)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MethodConfig(name="random"),
            "method random needs method.removed_ratio or method.num_layers; neither is set",
        ),
        (
            MethodConfig(name="shortgpt", num_layers=2, removed_ratio=0.1),
            "method shortgpt takes method.removed_ratio or method.num_layers, not both",
        ),
        (
            MethodConfig(name="shortgpt", num_layers=2, layer_metric="angular"),
            "method shortgpt measures method.layer_metric similarity, got angular; set method.name",
        ),
        (
            MethodConfig(name="random", num_layers=2, layers=(1,)),
            "method.layers would be ignored: method random draws layers at random; leave it unset",
        ),
        (
            MethodConfig(name="shortgpt", layers=(1,)),
            "method.layers would be ignored: shortgpt chooses the layers; set method.name=drop",
        ),
        (
            MethodConfig(name="shortgpt", num_layers=2, layer_seed=1),
            "method.layer_seed would be ignored: method shortgpt deletes layers and scores no",
        ),
    ],
)
def test_wrong_settings_are_refused(config: MethodConfig, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_method(config)
    assert str(raised.value).startswith(message)
