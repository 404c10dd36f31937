"""Truncation in measured metrics: optimal, comparable, within the budget, and robust."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.config import MethodConfig, Weighting
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.global_ranks import Budgeted, GlobalRanks
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.narrowing import Narrowable, narrowable_mlps
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.size import count_parameters
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan, SelectLayers
from grasp_lightning.stats.base import (
    Moments,
    Removable,
    Statistics,
    Step,
)
from grasp_lightning.stats.moments import MomentSums
from grasp_lightning.stats.observer import LinearObserver, shared_inputs
from tests.conftest import tiny_model
from tests.reference.definitions import curvature_error
from tests.unit.evaluation.test_perplexity import random_batch
from tests.unit.stats.test_observer import run

WEIGHTINGS: tuple[Weighting, ...] = (
    "none",
    "fisher_rows",
    "scale_columns",
    "input_gram",
    "kfac",
)


def moments(rows: int, columns: int, num_tokens: int = 64, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, columns, generator=generator)
    gradient = torch.randn(num_tokens, rows, generator=generator) / 10
    return Moments(
        input_gram=x.mT @ x / num_tokens,
        gradient_gram=gradient.mT @ gradient / num_tokens,
        input_scale=x.abs().mean(dim=0),
        fisher_columns=(gradient.mT @ x).square().sum(dim=0),
    )


def weight(rows: int = 12, columns: int = 20) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def truncated(found: Tensor, metric: Metric, measured: Moments, rank: int) -> Tensor:
    u, s, vh = metric.decompose(found, measured)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_losses_are_those_of_the_decomposition(weighting: Weighting) -> None:
    metric, measured = Metric(weighting=weighting), moments(12, 20)
    losses = metric.losses(weight(), measured)
    values = metric.decompose(weight(), measured).s
    torch.testing.assert_close(metric.of_singular_values(values), losses, rtol=1e-5, atol=1e-9)
    assert (losses.diff() <= 0).all()


def test_a_kfac_loss_is_half_the_curvature_of_what_is_dropped() -> None:
    metric = Metric(weighting="kfac", gradient_damping=0.0, input_damping=0.0)
    measured = moments(12, 20)
    change = weight() - truncated(weight(), metric, measured, 5)
    error = curvature_error(change, measured.gradient_gram, measured.input_gram)
    dropped = metric.losses(weight(), measured)[5:].sum()
    assert float(dropped) == pytest.approx(float(error) / 2, rel=1e-4)


def test_input_gram_minimises_the_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    measured = Moments(input_gram=x.mT @ x / 200)
    metric = Metric(weighting="input_gram", input_damping=0.0)
    plain = Metric(weighting="none")

    def error(approximation: Tensor) -> float:
        return float((x @ (weight() - approximation).mT).square().sum())

    best = truncated(weight(), metric, measured, 6)
    dropped = float(metric.losses(weight(), measured)[6:].sum())
    assert error(best) == pytest.approx(200 * dropped, rel=1e-4)
    assert error(best) < 0.9 * error(truncated(weight(), plain, measured, 6))
    for _ in range(20):
        noise = 0.01 * torch.randn(12, 20, generator=generator)
        nearby = truncated(best + noise, plain, measured, 6)
        assert error(nearby) >= error(best) * (1 - 1e-5)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_few_tokens_give_finite_factors(weighting: Weighting, num_tokens: int) -> None:
    found = truncated(weight(), Metric(weighting=weighting), moments(12, 20, num_tokens), 6)
    assert found.isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_linear_that_saw_nothing_is_cut_as_if_by_size(weighting: Weighting) -> None:
    nothing = Moments(
        input_gram=torch.zeros(20, 20),
        gradient_gram=torch.zeros(12, 12),
        input_scale=torch.zeros(20),
        fisher_columns=torch.zeros(20),
    )
    expected = truncated(weight(), Metric(weighting="none"), nothing, 6)
    found = truncated(weight(), Metric(weighting=weighting), nothing, 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def measured_moments(view: DecoderView, modules: tuple[str, ...]) -> dict[str, Moments]:
    return moments_on(view, modules, random_batch(batch=6, length=40))


def moments_on(
    view: DecoderView, modules: tuple[str, ...], batch: dict[str, Tensor]
) -> dict[str, Moments]:
    linears = view.all_linears()
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in modules}
    kinds = Metric(weighting="kfac").moment_kinds
    cpu = torch.device("cpu")
    sums = MomentSums(shapes, kinds, shared_inputs(view, modules), cpu)
    with frozen(view.model), LinearObserver(view, modules, sums.add).attached():
        run(view, batch)
    return sums.mean(int(batch["mask"].sum()))


def measure(view: DecoderView, step: Step) -> Statistics:
    if not step.needs.moment_kinds:
        return Statistics()
    return Statistics(moments=measured_moments(view, step.needs.moments))


def decided(dtype: torch.dtype, seed: int = 0) -> tuple[Plan, DecoderView]:
    model = tiny_model(seed=seed)
    nn.Module.to(model, dtype)
    view = DecoderView(model)
    config = resolve_method(MethodConfig(name="grasp_plus", refit="none", removed_ratio=0.3))
    method = build_method(config, view)
    return compress(view, method, measure, Plan(method=method.name), lambda *_: None), view


def test_the_budget_is_met_by_one_rank_unit_at_most() -> None:
    plan, view = decided(torch.float32)
    dense = count_parameters(tiny_model())
    kept = count_parameters(view.model)
    assert kept <= round(0.7 * dense)
    assert kept > 0.7 * dense - (32 + 48)
    assert len(set(plan.ranks.values())) > 1
    assert plan.channels
    assert not {n for n in plan.ranks if "mlp" in n}


def test_decisions_do_not_hang_on_the_precision_of_the_sums() -> None:
    single, _ = decided(torch.float32)
    # Of a model in float64 the passes are so, too: only the sums are float32.
    double, _ = decided(torch.float64)
    assert single.ranks.keys() == double.ranks.keys()
    first, second = single.ranks | single.channels, double.ranks | double.channels
    difference = {n: abs(first[n] - second[n]) for n in first}
    assert max(difference.values()) <= 1


def test_models_in_bfloat16_are_cut_in_bfloat16() -> None:
    plan, view = decided(torch.bfloat16)
    assert plan.ranks
    assert {p.dtype for p in view.model.parameters()} == {torch.bfloat16}
    ids = torch.arange(8)[None]
    assert view.model(input_ids=ids).logits.isfinite().all()


def test_what_costs_more_keeps_more() -> None:
    shapes = {"a": (40, 40), "b": (40, 40)}
    losses = {"a": torch.linspace(1, 0.01, 40) ** 2, "b": 100 * torch.linspace(1, 0.01, 40) ** 2}
    rule = GlobalRanks(keep_ratio=0.6, num_parameters=10_000)
    budgeted = Budgeted(shapes=shapes)
    ranks = rule.allocation(budgeted, losses).ranks
    assert ranks.get("b", 40) > ranks["a"]
    unit = replace(rule, multiple_of=4).allocation(budgeted, losses).ranks
    assert all(rank % 4 == 0 for rank in unit.values())


def narrowable(reader: str, num_channels: int) -> Narrowable:
    """An MLP of one writer, without biases, that 80 parameters of each channel belong to."""
    return Narrowable(
        reader=reader,
        writers=("up",),
        layer=1,
        num_channels=num_channels,
        channel_size=80,
        num_outputs=40,
    )


def test_channels_and_ranks_share_the_budget() -> None:
    mlp = narrowable("down", num_channels=40)
    budgeted = Budgeted(shapes={"a": (40, 40)}, mlps={"down": mlp})
    cheap, dear = torch.linspace(1, 0.01, 40) ** 2, 100 * torch.linspace(1, 0.01, 40) ** 2
    rule = GlobalRanks(keep_ratio=0.6, num_parameters=10_000, mlp="channels", multiple_of=8)
    narrowed = rule.allocation(budgeted, {"a": dear, "down": cheap})
    assert narrowed.dense == ("a",)
    assert narrowed.channels["down"] % 8 == 0
    assert narrowed.size <= rule.budget(budgeted) == round(0.6 * (1600 + 3200))
    cut = rule.allocation(budgeted, {"a": cheap, "down": dear})
    assert cut.channels["down"] > narrowed.channels["down"]
    assert cut.ranks["a"] == 8


def test_a_removed_layer_includes_the_rest_of_its_parameters() -> None:
    mlp = narrowable("down", num_channels=40)
    layer = Removable(name="layer", layer=1, linears=("a", "up", "down"), parameters=5000)
    # 200 of the parameters of the MLP's channels are biases, which stay.
    block = Removable(name="mlp", layer=1, linears=("up", "down"), parameters=3000, is_block=True)
    shapes = {"a": (40, 40), "b": (40, 40)}
    budgeted = Budgeted(shapes=shapes, mlps={"down": mlp}, removables=(layer, block))
    assert budgeted.size == budgeted.linear_size + 200 == 6600
    losses = {n: torch.linspace(1, 0.01, 40) ** 2 for n in ("a", "b", "down")}
    rule = GlobalRanks(removed_ratio=0.5, num_parameters=10_000, mlp="channels")
    free = rule.allocation(budgeted, losses, prices={"layer": 0.0, "mlp": 9.0})
    assert free.removed == ("layer",)
    assert free.dense == ("b",)
    assert free.size == 1600
    part = replace(rule, removed_ratio=0.3)
    narrower = part.allocation(budgeted, losses, prices={"layer": 90.0, "mlp": 0.0})
    assert narrower.removed == ("mlp",)
    assert narrower.size == 3200 + 200 + 200  # b, a, biases of the block, and norms of the layer
    kept = replace(rule, removed_ratio=None, keep_ratio=0.5)
    assert kept.budget(budgeted) == 3200 + 200


def test_losses_of_channels_are_half_the_curvature_of_their_removal() -> None:
    metric = Metric(weighting="kfac", gradient_damping=0.0, input_damping=0.0)
    measured = moments(12, 20)
    removal = metric.removal(weight(), measured)
    kept = removal.order[3:].sort().values
    change = weight()
    change[:, kept] -= metric.narrowed(weight(), measured, kept)
    error = curvature_error(change, measured.gradient_gram, measured.input_gram)
    assert float(removal.losses[:3].sum()) == pytest.approx(float(error) / 2, rel=1e-3)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_few_tokens_order_all_channels(num_tokens: int) -> None:
    metric, measured = Metric(weighting="kfac"), moments(12, 20, num_tokens)
    removal = metric.removal(weight(), measured)
    assert sorted(removal.order.tolist()) == list(range(20))
    assert metric.narrowed(weight(), measured, torch.tensor([0, 7])).isfinite().all()


def test_each_expert_has_the_order_and_losses_of_its_own_tokens() -> None:
    metric, experts = Metric(weighting="kfac", input_damping=1e-2), torch.randn(3, 12, 20)
    gram = moments(12, 20).input_gram
    assert gram is not None
    grams = torch.stack([gram, 2 * gram, 0 * gram])  # no token was routed to the last one
    measured = replace(moments(12, 20), input_gram=grams)
    removal = metric.removal(experts, measured)
    prior = 1e-2 * float(grams.diagonal(dim1=1, dim2=2).mean()) * torch.eye(20)
    alone = [
        metric.removal(weight, replace(measured, input_gram=own + prior))
        for weight, own in zip(experts, grams, strict=True)
    ]
    assert torch.equal(removal.order, torch.stack([one.order for one in alone]))
    torch.testing.assert_close(removal.losses, torch.stack([one.losses for one in alone]))
    assert float(alone[2].losses.min()) > 0
    kept = removal.order[:, 8:].sort(-1).values
    narrowed = metric.narrowed(experts, measured, kept, range(3))
    assert narrowed.shape == (3, 12, 12)
    assert torch.equal(metric.narrowed(experts, measured, kept[1:], (1, 2)), narrowed[1:])
    # Without tokens nothing says how channels depend on each other: they are only selected.
    torch.testing.assert_close(narrowed[2], experts[2][:, kept[2]])


def test_without_narrowable_mlps_all_linears_are_factors() -> None:
    view = DecoderView(tiny_model())
    config = resolve_method(MethodConfig(name="grasp_plus", mlp="factors", removed_ratio=0.3))
    method = build_method(config, view)
    assert narrowable_mlps(view, (0,)).keys() == {"model.layers.0.mlp.down_proj"}
    plan = Plan(method=method.name, operations=(SelectLayers(layers=view.layer_indices),))
    step = method.next_step(view, plan)
    assert step is not None
    assert set(step.needs.moments) == set(view.all_linears())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (GlobalRanks(removed_ratio=0.99, num_parameters=4000), "above 0 to 0.9400"),
        (GlobalRanks(keep_ratio=0.01, num_parameters=4000), "0.0600 to below 1"),
    ],
)
def test_a_budget_out_of_reach_names_the_range(rule: GlobalRanks, message: str) -> None:
    mlp = narrowable("c", num_channels=10)
    with pytest.raises(ConfigError, match=f"the feasible range of these linears is {message}"):
        rule.budget(Budgeted(shapes={"a": (40, 40), "b": (40, 40)}, mlps={"c": mlp}))


@pytest.mark.parametrize("num_parameters", [4001, 4567, 47_648])
@pytest.mark.parametrize(
    ("key", "beyond", "pattern"),
    [("removed_ratio", 0.9999, r"above 0 to (\S+)$"), ("keep_ratio", 1e-4, r"(\S+) to below 1$")],
)
def test_the_end_of_the_range_can_be_asked_for(
    key: str, beyond: float, pattern: str, num_parameters: int
) -> None:
    budgeted = Budgeted(shapes={"a": (40, 40), "b": (40, 40)}, mlps={"c": narrowable("c", 10)})

    def budget(ratio: float) -> int:
        removed, kept = (ratio if key == name else None for name in ("removed_ratio", "keep_ratio"))
        rule = GlobalRanks(removed_ratio=removed, keep_ratio=kept, num_parameters=num_parameters)
        return rule.budget(budgeted)

    with pytest.raises(ConfigError) as error:
        budget(beyond)
    end = re.search(pattern, str(error.value))
    assert end is not None
    assert 0 < budget(float(end[1])) < budgeted.size


@pytest.mark.parametrize(
    "rule",
    [
        GlobalRanks(removed_ratio=1e-4, num_parameters=4000),
        GlobalRanks(keep_ratio=1 - 1e-4, num_parameters=4000),
    ],
)
def test_a_budget_that_takes_nothing_is_refused(rule: GlobalRanks) -> None:
    with pytest.raises(
        ConfigError, match="removes less than one parameter: nothing would be removed"
    ):
        rule.budget(Budgeted(shapes={"a": (40, 40), "b": (40, 40)}))


@pytest.mark.parametrize("value", [-0.1, 101.0, math.inf, math.nan])
def test_dampings_are_shares(value: float) -> None:
    for key, config in (
        ("gradient_damping", MethodConfig(name="grasp_plus", gradient_damping=value)),
        ("input_damping", MethodConfig(name="grasp_plus", input_damping=value)),
    ):
        with pytest.raises(ConfigError, match=f"method.{key} must be from 0 to 100, got"):
            resolve_method(config)


def test_the_parts_are_in_the_plan() -> None:
    config = resolve_method(MethodConfig(name="low_rank", preset="svd_llm", removed_ratio=0.2))
    method = build_method(config, DecoderView(tiny_model()))
    assert method.options["weighting"] == "input_gram"
    assert method.options["input_damping"] == 1e-4
    assert "gradient_damping" not in method.options
    assert method.name == "low_rank"


def test_uniform_ranks_of_a_metric_are_those_of_plain_truncation() -> None:
    ranks = []
    for weighting in ("none", "kfac"):
        view = DecoderView(tiny_model())
        config = resolve_method(
            MethodConfig(name="low_rank", weighting=weighting, keep_ratio=0.4, num_layers=None)
        )
        method = build_method(config, view)
        plan = compress(view, method, measure, Plan(method=method.name), lambda *_: None)
        ranks.append(plan.ranks)
    assert ranks[0] == ranks[1]
