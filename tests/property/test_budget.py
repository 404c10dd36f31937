"""Every pair of keys that sets how much is removed, on models of several families and sizes."""

import functools
import re

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from grasp_lightning.config import MethodConfig, Schedule
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import FAMILIES, TINY_CONFIGS, tiny_model

NUM_LAYERS = 4
TOLERANCE = 1e-3  # share of the model, where one rank unit is not more
quick = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)
families = st.sampled_from(FAMILIES)
widths = st.sampled_from([32, 40, 64])
# As a user types them.
shares = st.integers(1, 995).map(lambda thousandths: thousandths / 1000)
keep_ratios = st.integers(1, 95).map(lambda hundredths: hundredths / 100)
layer_counts = st.integers(1, NUM_LAYERS)
layer_sets = st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1).map(lambda s: tuple(sorted(s)))


@functools.cache
def dense_view(family: str, width: int) -> DecoderView:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "vocab_size": 260}
    options = {**TINY_CONFIGS[family], **sizes, "pad_token_id": 258}
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    with torch.device("meta"):
        return DecoderView(AutoModelForCausalLM.from_config(config))


def unit(view: DecoderView) -> int:
    """Parameters of one rank of the largest linear."""
    return max(linear.in_features + linear.out_features for linear in view.linears(0).values())


def feasible_range(error: ConfigError) -> tuple[float, float]:
    found = re.search(r"feasible range .*?([\d.]+) to ([\d.]+)", str(error))
    assert found is not None, str(error)
    return float(found[1]), float(found[2])


def solved(view: DecoderView, config: MethodConfig) -> Prediction | None:
    """What is removed; None if the target is refused as out of reach, and it is."""
    assert config.removed_ratio is not None
    try:
        return predict(view, resolve_method(config))
    except ConfigError as error:
        low, high = feasible_range(error)
        assert not low <= config.removed_ratio <= high
        return None


def check_share(view: DecoderView, config: MethodConfig, prediction: Prediction) -> None:
    assert config.removed_ratio is not None
    assert prediction.most == prediction.least
    missed = prediction.dense - prediction.most - round(config.removed_ratio * prediction.dense)
    assert 0 <= missed <= max(unit(view), TOLERANCE * prediction.dense)


@quick
@given(families, widths, shares, layer_counts)
def test_a_share_of_a_number_of_layers_is_met_or_out_of_reach(
    family: str, width: int, share: float, count: int
) -> None:
    view = dense_view(family, width)
    config = MethodConfig(name="grasp", removed_ratio=share, num_layers=count)
    prediction = solved(view, config)
    if prediction is not None:
        check_share(view, config, prediction)
        assert prediction.num_layers == count


@quick
@given(families, widths, shares, layer_sets)
def test_a_share_of_explicit_layers_is_met_or_out_of_reach(
    family: str, width: int, share: float, layers: tuple[int, ...]
) -> None:
    view = dense_view(family, width)
    config = MethodConfig(name="grasp", removed_ratio=share, layers=layers)
    prediction = solved(view, config)
    if prediction is not None:
        check_share(view, config, prediction)


@quick
@given(families, widths, shares, keep_ratios)
def test_a_share_at_a_keep_ratio_takes_the_fewest_layers_and_gives_back_the_rest(
    family: str, width: int, share: float, keep_ratio: float
) -> None:
    view = dense_view(family, width)
    config = MethodConfig(name="grasp", removed_ratio=share, keep_ratio=keep_ratio)
    prediction = solved(view, config)
    assume(prediction is not None)
    assert prediction is not None
    check_share(view, config, prediction)
    count = prediction.num_layers
    uniform = predict(
        view, resolve_method(MethodConfig(name="grasp", num_layers=count, keep_ratio=keep_ratio))
    )
    assert uniform.most <= prediction.most
    assert all(prediction.ranks[name] >= rank for name, rank in uniform.ranks.items())
    if count > 1:
        fewer = MethodConfig(name="grasp", num_layers=count - 1, keep_ratio=keep_ratio)
        too_much = predict(view, resolve_method(fewer)).most
        assert prediction.dense - too_much < round(share * prediction.dense)


@quick
@given(families, widths, shares)
def test_deletion_gets_as_close_as_whole_layers_can(family: str, width: int, share: float) -> None:
    view = dense_view(family, width)
    prediction = solved(view, MethodConfig(name="drop", removed_ratio=share))
    if prediction is None:
        return
    one = count_parameters(view.layer(0))
    assert prediction.most == prediction.dense - prediction.num_layers * one
    distances = [abs(n * one - share * prediction.dense) for n in range(NUM_LAYERS + 1)]
    assert distances[prediction.num_layers] == min(distances)


@quick
@given(families, widths, st.tuples(shares, shares), layer_counts)
def test_a_larger_share_leaves_fewer_parameters(
    family: str, width: int, pair: tuple[float, float], count: int
) -> None:
    view = dense_view(family, width)
    smaller, larger = (
        solved(view, MethodConfig(name="grasp", removed_ratio=share, num_layers=count))
        for share in sorted(pair)
    )
    assume(smaller is not None and larger is not None)
    assert smaller is not None
    assert larger is not None
    assert larger.most <= smaller.most + unit(view)


@few
@given(families, shares, layer_sets, st.sampled_from(["one_shot", "iterative"]))
def test_the_compressed_model_has_the_predicted_size(
    family: str, share: float, layers: tuple[int, ...], schedule: Schedule
) -> None:
    config = resolve_method(
        MethodConfig(
            name="grasp", removed_ratio=share, layers=layers, score="magnitude", schedule=schedule
        )
    )
    view = DecoderView(tiny_model(family))
    try:
        prediction = predict(view, config)
    except ConfigError:
        assume(False)
    method = build_method(config, view)
    plan = Plan(method=method.name, options=method.options)
    compress(view, method, no_measurement, plan, lambda *_: None)
    assert count_parameters(view.model) == prediction.most
    missed = prediction.dense - prediction.most - share * prediction.dense
    assert -0.5 <= missed <= max(96, TOLERANCE * prediction.dense)


def no_measurement(view: DecoderView, step: Step) -> Statistics:
    del view
    assert step.needs.is_empty
    return Statistics()
