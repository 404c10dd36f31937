"""Attention and MLP blocks that are removed without their layers."""

import pytest

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import BlockChoice, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.base import untracked
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import in_attention
from grasp_lightning.models.size import count_parameters
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics
from grasp_lightning.training.removal_losses import removal_losses
from tests.conftest import tiny_model
from tests.unit.training.test_refit import windows
from tests.unit.training.test_removal_losses import calibration_data, parts


def removed(config: MethodConfig, view: DecoderView) -> Plan:
    method = build_method(resolve_method(config), view)
    measure = TrainerMeasure(calibration_data(windows(3), 2), progress=False, priced_windows=2)
    return compress(view, method, measure, Plan(method="drop"), lambda *_: None)


@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_exactly_the_cheapest_blocks_are_removed(unit: BlockChoice, family: str) -> None:
    view, dense = (DecoderView(tiny_model(family)) for _ in range(2))
    batches = [windows(3).batch([number]) for number in range(2)]
    prices = removal_losses(dense, parts(dense), batches, untracked)
    own = {name: price for name, price in prices.items() if name.endswith(f".{unit}")}
    assert len(own) == view.num_layers
    config = MethodConfig(name="drop", unit=unit, num_layers=2)
    predicted = predict(view, resolve_method(config))
    plan = removed(config, view)
    assert set(plan.removed_blocks) == set(sorted(own, key=lambda name: own[name])[:2])
    assert predicted.most == predicted.least == count_parameters(view.model)
    assert predicted.lines[1] == "2 attention or MLP blocks are removed"
    gone = {module for op in plan.operations for module in op.linears}
    inside = [name.partition(".layers.")[2].partition(".")[2] for name in gone]
    assert {in_attention(name) for name in inside} == {unit == "attention"}
    assert plan.selected_layers == tuple(
        sorted(view.layer_of(name) or 0 for name in plan.removed_blocks)
    )


def test_the_share_counts_all_parameters_and_is_the_nearest() -> None:
    view = DecoderView(tiny_model())
    shares = []
    for number in (1, 2, 3):
        config = MethodConfig(name="drop", unit="mlp", num_layers=number)
        found = predict(view, resolve_method(config))
        shares.append(1 - found.most / found.dense)
    between = (0.9 * shares[0] + 1.1 * shares[1]) / 2
    config = MethodConfig(name="drop", unit="mlp", removed_ratio=between)
    assert predict(view, resolve_method(config)).num_layers == 2
    with pytest.raises(ConfigError, match=r"out of reach: .*, from 1 to 3 mlp blocks deleted"):
        predict(view, resolve_method(MethodConfig(name="drop", unit="mlp", removed_ratio=0.9)))


def test_explicit_layers_lose_their_block_without_a_measurement() -> None:
    view = DecoderView(tiny_model())
    config = resolve_method(MethodConfig(name="drop", unit="attention", layers=(3, 1)))
    method = build_method(config, view)
    step = method.next_step(view, Plan(method="drop"))
    assert step is not None
    assert step.needs.is_empty
    plan = Plan(method="drop", operations=method.decide(step, view, Statistics()).operations)
    assert plan.removed_blocks == ("model.layers.1.attention", "model.layers.3.attention")
    assert method.next_step(view, plan) is None


def test_families_and_settings_without_such_blocks_are_refused() -> None:
    view = DecoderView(tiny_model("qwen3_moe"))
    config = resolve_method(MethodConfig(name="drop", unit="mlp", num_layers=1))
    with pytest.raises(ModelError, match=r"^layer 0 of Qwen3MoeForCausalLM has no mlp block of"):
        predict(view, config)
    with pytest.raises(ConfigError, match=r"layer_metric would be ignored: method.unit mlp is"):
        resolve_method(MethodConfig(name="drop", unit="mlp", num_layers=1, layer_metric="angular"))
