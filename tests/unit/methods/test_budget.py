"""From ``removed_ratio`` and one more key to layers and ranks; impossible targets are refused."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import predict, resolve_method, resolve_num_layers
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.methods.rank_rules import BudgetRanks, UniformRanks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from tests.conftest import FAMILIES, tiny_model
from tests.unit.models.helpers import meta_model

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def llama_2_7b() -> DecoderView:
    config = AutoConfig.for_model("llama", **LLAMA_2_7B)
    with torch.device("meta"):
        return DecoderView(AutoModelForCausalLM.from_config(config))


def predicted(view: DecoderView, config: MethodConfig) -> Prediction:
    return predict(view, resolve_method(config))


def removed(prediction: Prediction) -> float:
    assert prediction.most == prediction.least
    return 1 - prediction.most / prediction.dense


@pytest.mark.parametrize(
    ("removed_ratio", "keep_ratio"), [(0.228, 0.05), (0.216, 0.1), (0.204, 0.15), (0.192, 0.2)]
)
def test_a_share_of_llama_2_7b_is_solved_for_the_ratio_of_the_paper(
    llama_2_7b: DecoderView, removed_ratio: float, keep_ratio: float
) -> None:
    prediction = predicted(
        llama_2_7b, MethodConfig(name="grasp", removed_ratio=removed_ratio, num_layers=8)
    )
    assert prediction.lines[0].startswith(f"{removed_ratio:.1%} of 6,738,415,616")
    one_unit = (4096 + 11008) / 6_738_415_616
    assert 0 <= removed(prediction) - removed_ratio < one_unit
    assert prediction.num_layers == 8
    for name, linear in llama_2_7b.linears(0).items():
        rank = prediction.ranks[name.removeprefix("model.layers.0.")]
        size = linear.in_features + linear.out_features
        kept = rank * size / (linear.in_features * linear.out_features)
        assert kept == pytest.approx(keep_ratio, abs=0.002)


def test_a_share_and_a_keep_ratio_take_the_fewest_layers_of_llama_2_7b(
    llama_2_7b: DecoderView,
) -> None:
    one = removed(predicted(llama_2_7b, MethodConfig(name="grasp", num_layers=1, keep_ratio=0.1)))
    prediction = predicted(
        llama_2_7b, MethodConfig(name="grasp", removed_ratio=0.2, keep_ratio=0.1)
    )
    assert prediction.num_layers == 8
    assert 7 * one < 0.2 < 8 * one
    assert removed(prediction) == pytest.approx(0.2, abs=3e-6)
    uniform = predicted(llama_2_7b, MethodConfig(name="grasp", num_layers=8, keep_ratio=0.1))
    # What 8 layers remove beyond the target goes back as rank.
    assert uniform.most < prediction.most
    assert all(prediction.ranks[name] > rank for name, rank in uniform.ranks.items())


def test_a_share_that_whole_layers_remove_exactly_takes_just_these() -> None:
    view = DecoderView(meta_model("llama"))
    for count in (1, 2, 3, 4):
        exact = predicted(view, MethodConfig(name="grasp", num_layers=count, keep_ratio=0.3))
        config = MethodConfig(name="grasp", removed_ratio=removed(exact), keep_ratio=0.3)
        solved = predicted(view, config)
        assert (solved.num_layers, solved.most) == (count, exact.most)
        assert solved.ranks == exact.ranks


@pytest.mark.parametrize(
    ("removed_ratio", "count"), [(0.125, 4), (0.03, 1), (0.106, 4), (0.104, 3), (0.9, 30)]
)
def test_deletion_takes_the_nearest_number_of_layers(
    llama_2_7b: DecoderView, removed_ratio: float, count: int
) -> None:
    # One layer is 3.003 % of the model, 3.5 of them 10.51 %, 30 of them 90.1 %.
    for config in (
        MethodConfig(name="drop", removed_ratio=removed_ratio),
        MethodConfig(name="grasp", removed_ratio=removed_ratio, keep_ratio=0.0),
    ):
        prediction = predicted(llama_2_7b, config)
        assert prediction.num_layers == count
        assert abs(removed(prediction) - removed_ratio) <= 0.5 * 0.03005
        assert not prediction.ranks


def test_layers_are_resolved_only_where_they_are_not_given() -> None:
    view = DecoderView(meta_model("llama"))
    for config in (
        MethodConfig(name="grasp", num_layers=2, keep_ratio=0.3),
        MethodConfig(name="grasp", layers=(1, 3), removed_ratio=0.1),
        MethodConfig(name="grasp", num_layers=3, removed_ratio=0.1),
    ):
        resolved = resolve_method(config)
        assert resolve_num_layers(resolved, view) == resolved


def test_weights_of_explicit_layers_are_the_budget() -> None:
    view = DecoderView(meta_model("llama"))
    prediction = predicted(view, MethodConfig(name="grasp", layers=(0, 3), removed_ratio=0.15))
    assert removed(prediction) == pytest.approx(0.15, abs=1e-3)
    assert prediction.num_layers == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        MethodConfig(name="grasp", num_layers=2, removed_ratio=0.6),
        MethodConfig(name="grasp", layers=(1,), removed_ratio=0.5),
        MethodConfig(name="grasp", num_layers=4, removed_ratio=0.001),
        MethodConfig(name="grasp", keep_ratio=0.3, removed_ratio=0.7),
        MethodConfig(name="drop", removed_ratio=0.8),
        MethodConfig(name="drop", removed_ratio=0.01),
        MethodConfig(name="grasp", keep_ratio=0.0, removed_ratio=0.99),
    ],
)
def test_both_ends_of_the_feasible_range_that_a_refusal_prints_can_be_had(
    family: str, config: MethodConfig
) -> None:
    view = DecoderView(meta_model(family))
    with pytest.raises(ConfigError) as error:
        predicted(view, config)
    message = str(error.value)
    assert message.startswith(f"method.removed_ratio {config.removed_ratio} is out of reach")
    found = re.search(r"feasible range .*?([\d.]+) to ([\d.]+)", message)
    assert found is not None
    low, high = map(float, found.groups())
    assert config.removed_ratio is not None
    assert not low <= config.removed_ratio <= high
    for share in {low, high} - {0.0}:
        options = {**vars(config), "removed_ratio": share}
        prediction = predicted(view, MethodConfig(**options))
        assert removed(prediction) == pytest.approx(share, abs=2e-3)


def test_a_model_of_one_layer_has_none_to_delete() -> None:
    view = DecoderView(tiny_model("llama", num_hidden_layers=1))
    with pytest.raises(ConfigError, match="only one decoder layer, so none can be removed"):
        predicted(view, MethodConfig(name="drop", removed_ratio=0.2))


def test_weights_that_cannot_get_smaller_stay_out_of_the_budget() -> None:
    rule = BudgetRanks(removed_ratio=0.1, num_parameters=20_000)
    shapes = {"gate": (1, 64), "dense": (64, 64)}
    assert rule.ranks(shapes) == {"dense": 16}  # 4096 - 2000 = 2096 pays for 16 * 128
    assert UniformRanks(keep_ratio=0.5).ranks(shapes) == {"dense": 16}
    with pytest.raises(ConfigError, match=r"0\.0000 to 0\.0000"):
        rule.ranks({"gate": (1, 64)})


def test_a_share_below_one_rank_unit_is_within_the_tolerance() -> None:
    # The largest useful rank, 31, saves 128 of 4096 parameters: one unit.
    rule = BudgetRanks(removed_ratio=0.0001, num_parameters=100_000)
    assert rule.ranks({"dense": (64, 64)}) == {"dense": 31}


def test_layers_of_two_sizes_give_a_share_within_the_tolerance_whichever_are_chosen() -> None:
    model = tiny_model("llama")
    view = DecoderView(model)
    for name, linear in view.linears(3).items():
        rows, columns = linear.out_features, linear.in_features
        if name.endswith(("up_proj", "gate_proj")):
            view.set_module(name, nn.Linear(columns, rows + 16, bias=False))
        elif name.endswith("down_proj"):
            view.set_module(name, nn.Linear(columns + 16, rows, bias=False))
    prediction = predicted(view, MethodConfig(name="grasp", num_layers=1, removed_ratio=0.1))
    for size in (prediction.most, prediction.least):
        assert 1 - size / prediction.dense == pytest.approx(0.1, abs=80 / prediction.dense)
    # Four small layers would suffice, but the share must be reached for any choice.
    solved = predicted(view, MethodConfig(name="grasp", keep_ratio=0.3, removed_ratio=0.25))
    assert solved.most >= solved.least
    assert 1 - solved.most / count_parameters(model) == pytest.approx(0.25, abs=2e-3)


CONTRADICTIONS: list[tuple[MethodConfig, tuple[str, ...]]] = [
    (
        MethodConfig(name="grasp", removed_ratio=0.1, num_layers=2, keep_ratio=0.3),
        ("method.removed_ratio", "method.keep_ratio", "method.num_layers"),
    ),
    (
        MethodConfig(name="grasp", removed_ratio=0.1, layers=(2,), keep_ratio=0.0),
        ("method.removed_ratio", "method.keep_ratio", "method.layers"),
    ),
    (
        MethodConfig(name="grasp", removed_ratio=0.1, layers=(2,), num_layers=1),
        ("method.num_layers", "method.layers"),
    ),
    (
        MethodConfig(name="grasp", removed_ratio=0.1),
        ("method.removed_ratio", "method.num_layers", "method.layers", "method.keep_ratio"),
    ),
    (
        MethodConfig(name="grasp", removed_ratio=0.1, layers=(1,), layer_metric="angular"),
        ("method.layer_metric",),
    ),
    (
        MethodConfig(name="drop", removed_ratio=0.1, num_layers=2),
        ("method.removed_ratio", "method.num_layers"),
    ),
    (
        MethodConfig(name="drop", removed_ratio=0.1, layers=(2,)),
        ("method.removed_ratio", "method.layers"),
    ),
    (MethodConfig(name="drop", removed_ratio=0.1, keep_ratio=0.3), ("method.keep_ratio",)),
    (MethodConfig(name="drop", removed_ratio=0.1, schedule="iterative"), ("method.schedule",)),
    (
        MethodConfig(name="grasp", num_layers=1, schedule="iterative", score_all_layers=True),
        ("method.score_all_layers", "schedule iterative"),
    ),
]


@pytest.mark.parametrize(("config", "keys"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_named(
    config: MethodConfig, keys: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_method(config)
    for key in keys:
        assert key in str(error.value)


@pytest.mark.parametrize("removed_ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_zero_and_one_is_refused(removed_ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.removed_ratio must be above 0 and below 1"):
        resolve_method(MethodConfig(name="grasp", removed_ratio=removed_ratio, num_layers=2))


@pytest.mark.parametrize(
    "config",
    [
        MethodConfig(name="grasp", removed_ratio=0.1, num_layers=2),
        MethodConfig(name="grasp", removed_ratio=0.1, keep_ratio=0.3),
        MethodConfig(name="drop", removed_ratio=0.2),
    ],
)
def test_resolving_twice_changes_nothing(config: MethodConfig) -> None:
    once = resolve_method(config)
    assert resolve_method(once) == once
    view = DecoderView(meta_model("llama"))
    assert resolve_num_layers(resolve_num_layers(once, view), view) == resolve_num_layers(
        once, view
    )
