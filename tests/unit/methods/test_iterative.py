"""Schedule ``iterative``: the order of its steps, what they are scored on, and how it resumes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.config import MethodConfig
from grasp_lightning.linalg.components import window_scores
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.blocks import blocks, weight_shapes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import FactorizeLinear, Plan
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import ALL_FAMILIES, FAMILIES, MOE_FAMILIES, tiny_model
from tests.reference.factorized_linear import FactorizedLinear

WINDOWS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
SIMILARITY = torch.tensor([0.2, 0.9, 0.5, 0.9])  # chooses 1 and 3
ATTENTION = {"llama": "self_attn", "qwen2": "self_attn", "opt": "self_attn"}
ATTENTION["gpt_neox"] = "attention"


def loss_of(view: DecoderView, window: Tensor) -> Tensor:
    logits = view.model(window[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum")


def measure(view: DecoderView, step: Step) -> Statistics:
    """Measure by autograd on the dense weights; paper's scoring. Layer similarity is made up."""
    if not step.needs.weight_gradients:
        return Statistics(layer_metric=SIMILARITY)
    names = step.needs.weight_gradients
    weights = [view.model.get_parameter(f"{name}.weight") for name in names]
    scores = {name: torch.zeros_like(step.bases[name].s) for name in names}
    for window in WINDOWS:
        grads = torch.autograd.grad(loss_of(view, window), weights)
        for name, grad in zip(names, grads, strict=True):
            basis = step.bases[name]
            scores[name] += window_scores(basis, grad, terms="full", score="taylor", squared=False)
    num_targets = WINDOWS[:, 1:].numel()
    return Statistics(component_scores={n: values / num_targets for n, values in scores.items()})


@dataclass
class Recorded:
    """What a run leaves after each step."""

    plans: list[Plan] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def __call__(self, plan: Plan, decision: Decision) -> None:
        self.plans.append(plan)
        self.decisions.append(decision)

    def tensors(self, num_steps: int) -> dict[str, Tensor]:
        """Factors of the first steps."""
        done = self.decisions[:num_steps]
        return {name: tensor for decision in done for name, tensor in decision.tensors.items()}


def iterative(family: str, config: MethodConfig | None = None) -> CompressionMethod:
    config = config or MethodConfig(
        name="grasp", num_layers=2, keep_ratio=0.3, schedule="iterative"
    )
    return build_method(resolve_method(config), DecoderView(tiny_model(family)))


def run(family: str, method: CompressionMethod) -> tuple[DecoderView, Plan, Recorded]:
    view, recorded = DecoderView(tiny_model(family)), Recorded()
    plan = Plan(method=method.name, options=method.options)
    return view, compress(view, method, measure, plan, recorded), recorded


def factorized(decided: Plan | Decision) -> list[FactorizeLinear]:
    return [op for op in decided.operations if isinstance(op, FactorizeLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_comes_first_and_its_mlp_before_its_attention(family: str) -> None:
    view, plan, recorded = run(family, iterative(family))
    assert len(recorded.decisions) == 1 + 2 * 2
    dense = DecoderView(tiny_model(family))
    marker = f".{ATTENTION[family]}."
    treated = [{op.module for op in factorized(d)} for d in recorded.decisions]
    expected: list[set[str]] = [set()]
    for index in (3, 1):
        names = set(dense.linears(index))
        attention = {name for name in names if marker in name}
        expected += [names - attention, attention]
    assert treated == expected
    assert all(expected[1:])
    assert plan.selected_layers == (1, 3)
    assert not view.linears(1)
    assert not view.linears(3)


def autograd_scores(view: DecoderView, modules: set[str]) -> Mapping[str, Tensor]:
    """Score the components of some linears by running them in factored form."""
    explicit = {}
    for name in sorted(modules):
        linear = view.module(name)
        assert isinstance(linear, nn.Linear)
        u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        explicit[name] = FactorizedLinear(u, s, vh.mT, linear.bias)
        view.model.set_submodule(name, explicit[name])
    scores = {name: torch.zeros_like(module.s) for name, module in explicit.items()}
    for window in WINDOWS:
        view.model.zero_grad()
        loss_of(view, window).backward()
        for name, module in explicit.items():
            for theta in (module.u, module.s, module.v):
                assert theta.grad is not None
                moduli = (theta.detach() * theta.grad).abs()
                scores[name] += moduli.sum(dim=0) if moduli.ndim > 1 else moduli
    return {name: values / WINDOWS[:, 1:].numel() for name, values in scores.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_is_scored_on_the_model_with_all_before_it_replaced(family: str) -> None:
    _, _, recorded = run(family, iterative(family))
    for number, decision in enumerate(recorded.decisions[1:], start=1):
        view = DecoderView(tiny_model(family))
        apply_operations(view, recorded.plans[number - 1].operations, recorded.tensors(number))
        modules = {op.module for op in factorized(decision)}
        for name, expected in autograd_scores(view, modules).items():
            actual = decision.scores[f"{name}.scores"]
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


def test_scores_differ_from_one_shot_below_the_first_block() -> None:
    config = MethodConfig(name="grasp", num_layers=2, keep_ratio=0.3, schedule="one_shot")
    _, _, first = run("llama", iterative("llama"))
    _, _, second = run("llama", iterative("llama", config))
    one_shot = second.decisions[1].scores
    top = {op.module for op in factorized(first.decisions[1])}
    for decision in first.decisions[1:]:
        for name, values in decision.scores.items():
            if name.endswith(".scores"):
                is_top = name.removesuffix(".scores") in top
                assert torch.allclose(values, one_shot[name], rtol=1e-4) == is_top


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_chooses_the_same_by_either_schedule(family: str) -> None:
    runs = [
        run(
            family,
            iterative(
                family,
                MethodConfig(
                    name="grasp",
                    layers=(0, 2),
                    keep_ratio=0.3,
                    score="magnitude",
                    schedule=schedule,
                ),
            ),
        )
        for schedule in ("one_shot", "iterative")
    ]
    (one_view, one_plan, _), (two_view, two_plan, two) = runs
    assert set(factorized(one_plan)) == set(factorized(two_plan))
    assert one_plan.operations != two_plan.operations  # their order
    assert len(two.decisions) == 5
    ids = WINDOWS[:1]
    assert torch.equal(one_view.model(ids).logits, two_view.model(ids).logits)


@pytest.mark.parametrize(
    ("family", "keep_ratio", "removed_ratio"),
    [*((family, 0.3, None) for family in FAMILIES), ("llama", None, 0.12)],
)
def test_a_run_resumes_after_every_step_to_the_same_bytes(
    family: str, keep_ratio: float | None, removed_ratio: float | None
) -> None:
    config = MethodConfig(
        name="grasp",
        num_layers=2,
        keep_ratio=keep_ratio,
        removed_ratio=removed_ratio,
        schedule="iterative",
    )
    method = iterative(family, config)
    whole, final, recorded = run(family, method)
    for number, plan in enumerate(recorded.plans, start=1):
        view, rest = DecoderView(tiny_model(family)), Recorded()
        stored = Plan.from_json(plan.to_json())
        apply_operations(view, stored.operations, recorded.tensors(number))
        resumed = compress(view, method, measure, stored, rest)
        assert resumed.to_json() == final.to_json()
        assert len(rest.decisions) == len(recorded.decisions) - number
        ids = WINDOWS[:1]
        assert torch.equal(view.model(ids).logits, whole.model(ids).logits)


def test_ranks_of_a_budget_do_not_depend_on_the_schedule() -> None:
    ranks = [
        run(
            "llama",
            iterative(
                "llama",
                MethodConfig(name="grasp", num_layers=2, removed_ratio=0.12, schedule=schedule),
            ),
        )[1].ranks
        for schedule in ("one_shot", "iterative")
    ]
    assert ranks[0] == ranks[1]


def test_a_linear_that_cannot_get_smaller_stays_and_ends_the_run() -> None:
    # With sides of 4 and 1, rank 1 costs 5 parameters and the weight 4.
    sizes = {"hidden_size": 4, "intermediate_size": 1, "num_key_value_heads": 1}
    view, recorded = DecoderView(tiny_model("llama", **sizes)), Recorded()
    config = MethodConfig(name="grasp", layers=(1, 2), keep_ratio=0.5, schedule="iterative")
    method = build_method(resolve_method(config), view)
    plan = compress(view, method, measure, Plan(method=method.name), recorded)
    names = {name.rpartition(".")[2] for name in plan.ranks}
    assert names == {"q_proj", "o_proj"}
    assert len(recorded.decisions) == 3  # no step for unchanged MLP blocks
    assert method.next_step(view, plan) is None


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_has_its_blocks(family: str) -> None:
    view = DecoderView(tiny_model(family))
    mlp, attention = blocks(view, 1)
    assert {*mlp, *attention} == set(view.linears(1))
    assert attention
    assert bool(mlp) == (family not in MOE_FAMILIES)
    assert not any("fc" in name or "mlp" in name or "_4h" in name for name in attention)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_shapes_stay_the_same_while_weights_are_replaced(family: str) -> None:
    method = iterative(
        family, MethodConfig(name="grasp", layers=(1,), keep_ratio=0.3, score="magnitude")
    )
    view, plan = DecoderView(tiny_model(family)), Plan(method="grasp")
    before = weight_shapes(view, plan, (0, 1))
    plan = compress(view, method, measure, plan, lambda *_: None)
    assert plan.ranks
    assert weight_shapes(view, plan, (0, 1)) == before
