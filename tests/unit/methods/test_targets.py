"""What a target lets a budget cut, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from grasp_lightning.config import MethodConfig, TargetChoice
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.global_ranks import Budgeted, GlobalRanks
from grasp_lightning.methods.narrowing import Narrowable
from grasp_lightning.methods.targets import TARGETS, read_target_losses, stored_target_losses
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Removable
from tests.conftest import tiny_model
from tests.unit.models.helpers import meta_model

OPTIONS = MethodConfig(name="grasp_plus", removed_ratio=0.2)


def budgeted() -> Budgeted:
    """Two layers: an attention matrix of 1600 parameters, an MLP of 64 channels of 80 each."""
    mlps = {
        name: Narrowable(
            reader=name, writers=("up",), layer=0, num_channels=64, channel_size=80, num_outputs=40
        )
        for name in ("down0", "down1")
    }
    return Budgeted(shapes={"a0": (40, 40), "a1": (40, 40)}, mlps=mlps)


LOSSES = {
    "a0": torch.linspace(1, 0, 40) ** 4,
    "a1": torch.linspace(1, 0, 40) ** 4,
    "down0": torch.linspace(1, 0.1, 64),
    "down1": 9 * torch.linspace(1, 0.1, 64),
}
SIZE = 2 * 1600 + 2 * 64 * 80
RULE = GlobalRanks(removed_ratio=0.2, num_parameters=SIZE, mlp="channels")


@pytest.mark.parametrize(("target", "unit"), [("no_factors", 1), ("gguf", 32), ("plain", 32)])
def test_a_target_leaves_attention_dense(target: TargetChoice, unit: int) -> None:
    allocation = replace(RULE, target=target).allocation(budgeted(), LOSSES)
    assert allocation.ranks == {}
    assert {"a0", "a1"} <= set(allocation.dense)
    assert allocation.size <= 0.8 * SIZE
    assert all(count % unit == 0 for count in allocation.channels.values())
    assert RULE.allocation(budgeted(), LOSSES).ranks


def test_a_keep_ratio_counts_attention_as_well() -> None:
    rule = replace(RULE, removed_ratio=None, keep_ratio=0.8, target="no_factors")
    assert rule.budget(budgeted()) == round(0.8 * SIZE)
    assert rule.allocation(budgeted(), LOSSES).size <= 0.8 * SIZE


def test_plain_gives_both_mlps_one_width() -> None:
    rule = replace(RULE, target="plain", multiple_of=1)
    assert rule.allocation(budgeted(), LOSSES).channels == {"down0": 47, "down1": 47}
    free = replace(RULE, target="no_factors").allocation(budgeted(), LOSSES).channels
    assert free["down0"] < free.get("down1", 64)


def test_plain_may_remove_layers_for_wider_mlps() -> None:
    layer = Removable(name="layer", layer=1, linears=("a1", "down1"), parameters=1600 + 64 * 80)
    parts = replace(budgeted(), removables=(layer,))
    rule = replace(RULE, target="plain", multiple_of=1, removable="layers")
    removed = rule.allocation(parts, LOSSES, {"layer": 0.5})
    assert (removed.removed, removed.channels) == (("layer",), {})
    kept = rule.allocation(parts, LOSSES, {"layer": 500.0})
    assert kept.channels == {"down0": 47, "down1": 47}


def test_losses_of_all_targets_are_predicted_with_the_multiples_of_each() -> None:
    view = DecoderView(tiny_model())
    found = RULE.target_losses(budgeted(), LOSSES, view=view)
    # The stand-in of two layers does not fit the model of four, so plain is left out.
    assert list(found) == ["any", "no_factors", "gguf"]
    assert found["any"] < found["no_factors"] < found["gguf"]
    assert found["gguf"] == replace(RULE, target="gguf").allocation(budgeted(), LOSSES).loss
    stored = read_target_losses(stored_target_losses(found))
    assert stored == pytest.approx(found)
    assert RULE.target_losses(Budgeted(shapes={"a": (4, 4)}), {"a": torch.ones(4)}, view=view) == {}


def test_targets_are_options_of_the_plan_unless_they_are_any() -> None:
    view = DecoderView(tiny_model())
    options = build_method(resolve_method(OPTIONS), view).options
    assert "target" not in options
    named = build_method(resolve_method(replace(OPTIONS, target="any")), view).options
    assert named == options
    gguf = build_method(resolve_method(replace(OPTIONS, target="gguf")), view).options
    assert gguf == {**options, "target": "gguf", "multiple_of": 32}
    own = replace(OPTIONS, target="gguf", multiple_of=1)
    assert build_method(resolve_method(own), view).options == {**options, "target": "gguf"}


def test_low_rank_with_a_target_removes_channels() -> None:
    config = MethodConfig(name="low_rank", ranks="global", weighting="kfac", target="no_factors")
    assert resolve_method(config).mlp == "channels"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "gguf", "mlp": "factors"}, "needs method.mlp=channels, got factors"),
        ({"target": "plain", "weighting": "none"}, "kfac or input_gram, got none"),
        ({"target": "plain", "layers": (0, 1)}, "one width, so method.layers cannot choose"),
        ({"target": "plain", "num_layers": 2}, "one width, so method.num_layers cannot choose"),
        ({"target": "plain", "removable": "layers_and_blocks"}, "set method.removable=layers"),
        ({"target": "gguf", "ranks": "uniform"}, "method.target would be ignored"),
        ({"target": "gguf", "name": "grasp"}, "method.target would be ignored: method grasp"),
        ({"target": "gguf", "name": "drop"}, "method.target would be ignored: method drop"),
    ],
)
def test_keys_that_contradict_a_target_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_method(replace(OPTIONS, **change))  # type: ignore[arg-type]  # mixed values
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("bloom", "plain", "BloomForCausalLM has a config without a key for the width"),
        ("mixtral", "gguf", "has experts, which format gguf does not write; use method.target=p"),
        ("deepseek_v3", "plain", "has MLPs of different widths, 16 to 48 channels; use method.t"),
    ],
)
def test_models_that_a_target_cannot_cut_are_refused_before_they_are_measured(
    family: str, target: TargetChoice, message: str
) -> None:
    config = resolve_method(replace(OPTIONS, target=target))
    with pytest.raises(ConfigError, match=message):
        predict(DecoderView(meta_model(family)), config)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_experts_of_eight_channels_cannot_get_narrower(target: TargetChoice) -> None:
    config = resolve_method(replace(OPTIONS, target=target))
    with pytest.raises(ConfigError, match=r"has no MLP whose channels can be removed; use method"):
        predict(DecoderView(meta_model("mixtral", intermediate_size=8)), config)


def test_mixtures_without_a_key_for_their_width_lose_experts_for_an_ordinary_folder() -> None:
    view = DecoderView(meta_model("deepseek_v3", n_routed_experts=8))
    found = predict(view, resolve_method(replace(OPTIONS, target="plain", removed_ratio=0.1)))
    assert {*found.experts.values()} == {(6, 8)}
    assert len(found.experts) == view.num_layers - 1
    assert found.widths == {}
    # Three matrices, and a row of the router.
    assert found.dense - found.most == 3 * 2 * (3 * 16 * 32 + 32) >= 0.1 * found.dense
    assert "all mixtures keep 6 of 8 experts, in an ordinary model folder" in found.lines[1]
    with pytest.raises(ConfigError, match=r"range of these linears with attention dense"):
        predict(view, resolve_method(replace(OPTIONS, target="plain", removed_ratio=0.3)))
    wide = DecoderView(meta_model("mixtral", intermediate_size=64))
    lines = predict(wide, resolve_method(replace(OPTIONS, target="plain"))).lines
    assert "the data decides on it, and on the experts that are removed" in lines[1]


def test_a_budget_that_dense_attention_puts_out_of_reach_names_the_range() -> None:
    config = replace(OPTIONS, removed_ratio=0.6, multiple_of=1)
    view = DecoderView(meta_model("llama"))
    assert predict(view, resolve_method(config)).is_budget
    for target in TARGETS[1:]:
        with pytest.raises(ConfigError, match=rf"dense \(target {target}\) is above 0 to 0.37"):
            predict(view, resolve_method(replace(config, target=target)))


def test_shapes_alone_decide_on_a_plain_width() -> None:
    view = DecoderView(meta_model("llama", intermediate_size=256))
    found = predict(view, resolve_method(replace(OPTIONS, target="plain")))
    assert set(found.widths.values()) == {(160, 256)}
    assert found.dense - found.most == 96 * 3 * 32 * 4
    assert "all MLPs get one width: 160 of 256 channels" in found.lines[1]
    free = predict(view, resolve_method(replace(OPTIONS, target="no_factors")))
    assert free.widths == {}
    assert "the data decides on their widths" in free.lines[1]
