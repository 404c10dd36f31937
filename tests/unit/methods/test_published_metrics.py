"""Presets of low_rank against the formulas of their publications, written out in float64."""

import math

import torch
from torch import Tensor

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig, PresetName
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import Decision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeLinear, Plan, SelectLayers
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.evaluation.test_perplexity import random_batch
from tests.unit.stats.test_observer import Batch, run


def decided(
    view: DecoderView, batch: Batch, preset: PresetName
) -> tuple[Decision, Step, Statistics]:
    """Return what a preset decides on some windows, of which two are in a batch."""
    config = MethodConfig(name="low_rank", preset=preset, removed_ratio=0.25)
    method = build_method(resolve_method(config), view)
    chosen = Plan(method=method.name, operations=(SelectLayers(layers=view.layer_indices),))
    step = method.next_step(view, chosen)
    assert step is not None
    windows = TokenWindows(batch["input_ids"], batch["mask"], batch["targets"])
    settings = CalibrationConfig(source="pydoc", batch_size=2)
    data = CalibrationData(settings, byte_tokenizer(), windows=windows)
    stats = TrainerMeasure(data, progress=False)(view, step)
    return method.decide(step, view, stats), step, stats


def product(decision: Decision, module: str) -> Tensor:
    return (decision.tensors[f"{module}.left"] @ decision.tensors[f"{module}.right"]).double()


def by_columns(weight: Tensor, scale: Tensor, rank: int) -> Tensor:
    """Return the best weight of a rank where each input counts ``scale``."""
    u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank] / scale
    return best


def test_fwsvd_sums_the_squared_gradients_of_single_windows() -> None:
    view, batch = DecoderView(tiny_model()), random_batch(batch=5, length=12)
    decision, step, _ = decided(view, batch, "fwsvd")
    assert step.ranks is not None
    for module in ("model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"):
        weight = view.model.get_parameter(f"{module}.weight")
        gradients = []
        for number in range(5):
            view.model.zero_grad()
            run(view, {key: value[number : number + 1] for key, value in batch.items()})
            assert weight.grad is not None
            gradients.append(weight.grad.double())
        # Hsu et al.: the importance of an input is the sum over its weights, its factor the root.
        single = torch.stack([g.square() for g in gradients]).sum(dim=(0, 1)).sqrt()
        together = torch.stack(gradients).sum(dim=0).square().sum(dim=0).sqrt()
        dense, found = weight.detach().double(), product(decision, module)
        expected = by_columns(dense, single, step.ranks[module])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert (found - by_columns(dense, together, step.ranks[module])).abs().max() > 1e-2
        assert (found - by_columns(dense, single.sqrt(), step.ranks[module])).abs().max() > 1e-2


def test_svd_llm_v2_varies_ranks_by_its_formula_within_the_budget() -> None:
    view, batch = DecoderView(tiny_model()), random_batch(batch=8, length=24)
    decision, step, stats = decided(view, batch, "svd_llm_v2")
    assert step.ranks is not None
    linears, uniform = view.all_linears(), step.ranks
    ranks = {op.module: op.rank for op in decision.operations if isinstance(op, FactorizeLinear)}
    assert ranks.keys() == uniform.keys()
    weights = {name: linears[name].weight.detach().double() for name in ranks}

    losses: dict[str, float] = {}
    for name, weight in weights.items():
        gram = stats.moments[name].input_gram
        assert gram is not None
        gram = gram.double() + 1e-4 * gram.double().diagonal().mean() * torch.eye(len(gram))
        # Algorithm 2: two singular value decompositions instead of a Cholesky root.
        basis, values, _ = torch.linalg.svd(gram)
        u, s, vh = torch.linalg.svd(weight @ basis * values.sqrt(), full_matrices=False)
        losses[name] = math.sqrt(256 * 2048 * float(s[uniform[name] :].square().sum()))
        rank = ranks[name]
        truncated = (u[:, :rank] * s[:rank]) @ vh[:rank] / values.sqrt() @ basis.mT
        torch.testing.assert_close(product(decision, name), truncated, rtol=1e-3, atol=1e-4)

    removal: dict[str, float] = {}
    for name in ranks:
        kind = name.split(".", maxsplit=3)[3]
        group = [1 / math.log(losses[other]) for other in ranks if other.endswith(kind)]
        assert len(group) == 4
        removal[name] = len(group) / math.log(losses[name]) / sum(group)

    costs = {name: sum(weight.shape) for name, weight in weights.items()}
    exact = {name: weight.numel() / costs[name] for name, weight in weights.items()}
    kept = sum(costs[name] * rank for name, rank in uniform.items())

    def floored(scale: float) -> dict[str, int]:
        return {n: max(1, math.floor(exact[n] * (1 - scale * removal[n]))) for n in ranks}

    def cost(of: dict[str, int]) -> int:
        return sum(costs[name] * rank for name, rank in of.items())

    scale = next(k / 1e4 for k in range(10_000) if cost(floored(k / 1e4)) <= kept)
    floors = floored(scale)
    assert 0 <= kept - cost(ranks) < min(costs.values())
    assert all(0 <= ranks[name] - floors[name] <= 1 for name in ranks)
    assert any(ranks[name] != uniform[name] for name in ranks)
