"""Which experts a budget removes, and how many."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grasp_lightning.methods.expert_removal import choices_of_experts, removals_of_experts
from grasp_lightning.methods.global_ranks import Budgeted, GlobalRanks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from tests.conftest import tiny_model


def budgeted(family: str, **overrides: int) -> tuple[DecoderView, GlobalRanks, Budgeted]:
    view = DecoderView(tiny_model(family, 0, moe_intermediate_size=64, **overrides))
    rule = GlobalRanks(
        removed_ratio=0.3, num_parameters=count_parameters(view.model), mlp="channels"
    )
    return view, rule, rule.budgeted(view, view.layer_indices)


def losses(parts: Budgeted, idle: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Equal losses of everything but some experts, which cost nothing."""
    found = {name: torch.ones(min(shape)) for name, shape in parts.shapes.items()}
    for name, mlp in parts.mlps.items():
        found[name] = torch.ones(mlp.loss_shape)
        if mlp.num_experts:
            found[name][[*idle]] = 0
    return found


def test_groups_lose_equally_many_of_their_cheapest_experts() -> None:
    _, _, parts = budgeted("deepseek_v3", n_routed_experts=8)
    values = losses(parts)
    for name, loss in values.items():
        if parts.mlps[name].num_experts if name in parts.mlps else False:
            values[name] = loss * torch.tensor([5.0, 1, 2, 3, 1, 1, 0, 4])[:, None]
    every, first, second = choices_of_experts(parts.mixtures, parts.mlps, values)
    assert every.kept == {}
    assert {*first.kept.values()} == {(0, 2, 3, 4, 5, 7)}
    assert {*first.losses.values()} == {64.0}
    assert {*second.kept.values()} == {(0, 3, 4, 7)}  # of equal prices, the earlier stays


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_cost_nothing_are_removed_first(family: str) -> None:
    overrides = {"num_experts": 6} if family == "qwen3_moe" else {"num_local_experts": 6}
    view, rule, parts = budgeted(family, intermediate_size=64, **overrides)
    found = rule.allocation(parts, losses(parts, idle=(1, 4)))
    assert {*found.experts.values()} == {(0, 2, 3, 5)}
    assert found.size <= rule.budget(parts)
    operations = removals_of_experts(parts.mixtures, found.experts)
    assert len(operations) == view.num_layers
    only = replace(rule, removed_ratio=1 - parameters_after(view, operations) / rule.num_parameters)
    exact = only.allocation(parts, losses(parts, idle=(1, 4)))
    assert (exact.loss, exact.channels, exact.ranks) == (0, {}, {})
    assert exact.size == only.budget(parts)
    # Where each expert has channels that cost little, narrower experts cost less than fewer.
    uneven = {n: loss * torch.linspace(2, 0, loss.shape[-1]) for n, loss in losses(parts).items()}
    assert replace(rule, removed_ratio=0.1).allocation(parts, uneven).experts == {}
