"""Truncation in measured metrics: optimal, comparable, within the budget, and robust."""

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.config import MethodConfig, Weighting
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.weightings import curvature_error
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.global_ranks import GlobalRanks
from grasp_lightning.methods.weighting import Metric
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.size import count_parameters
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Moments, Statistics, Step
from grasp_lightning.stats.moments import MomentSums
from grasp_lightning.stats.observer import LinearObserver, shared_inputs
from tests.conftest import tiny_model
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
    linears = {n: m for index in view.layer_indices for n, m in view.linears(index).items()}
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in modules}
    kinds = Metric(weighting="kfac").moment_kinds
    cpu = torch.device("cpu")
    sums = MomentSums(shapes, kinds, shared_inputs(view, modules), cpu)
    with frozen(view.model), LinearObserver(view, modules, sums.add).attached():
        run(view, random_batch(batch=6, length=40))
    return sums.mean(6 * 40)


def measure(view: DecoderView, step: Step) -> Statistics:
    if not step.needs.moment_kinds:
        return Statistics()
    return Statistics(moments=measured_moments(view, step.needs.moments))


def decided(dtype: torch.dtype, seed: int = 0) -> tuple[Plan, DecoderView]:
    model = tiny_model(seed=seed)
    nn.Module.to(model, dtype)
    view = DecoderView(model)
    config = resolve_method(MethodConfig(name="grasp_plus", removed_ratio=0.3))
    method = build_method(config, view)
    return compress(view, method, measure, Plan(method=method.name), lambda *_: None), view


def test_the_budget_is_met_by_one_rank_unit_at_most() -> None:
    plan, view = decided(torch.float32)
    dense = count_parameters(tiny_model())
    kept = count_parameters(view.model)
    assert kept <= round(0.7 * dense)
    assert kept > 0.7 * dense - (32 + 48)
    assert len(set(plan.ranks.values())) > 1


def test_decisions_do_not_hang_on_the_precision_of_the_sums() -> None:
    single, _ = decided(torch.float32)
    # Of a model in float64 the passes are so, too: only the sums are float32.
    double, _ = decided(torch.float64)
    assert single.ranks.keys() == double.ranks.keys()
    difference = {n: abs(single.ranks[n] - double.ranks[n]) for n in single.ranks}
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
    ranks = rule.ranks(shapes, losses)
    assert ranks.get("b", 40) > ranks["a"]
    unit = GlobalRanks(keep_ratio=0.6, num_parameters=10_000, multiple_of=4).ranks(shapes, losses)
    assert all(rank % 4 == 0 for rank in unit.values())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (GlobalRanks(removed_ratio=0.99, num_parameters=3200), "0.0000 to 0.9500"),
        (GlobalRanks(keep_ratio=0.01, num_parameters=3200), "0.0500 to 1.0000"),
    ],
)
def test_a_budget_out_of_reach_names_the_range(rule: GlobalRanks, message: str) -> None:
    with pytest.raises(ConfigError, match=f"the feasible range of these linears is {message}"):
        rule.budget({"a": (40, 40), "b": (40, 40)})


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
