"""Truncation under one budget: the data decides on ranks, channels and removed parts."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from grasp_lightning.linalg.ranks import factor_parameters, ranks_for_budget
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.embedding_rows import MeasuredRows, measured_vocabulary
from grasp_lightning.methods.expert_removal import choices_of_experts, removals_of_experts
from grasp_lightning.methods.global_ranks import Budgeted, GlobalRanks
from grasp_lightning.methods.narrowing import channel_orders, narrowing
from grasp_lightning.methods.prediction import Layers, Outlook, Prediction
from grasp_lightning.methods.removal import removal_operations, stored_prices
from grasp_lightning.methods.targets import stored_target_losses
from grasp_lightning.methods.truncation import Measured, MetricMethod, component_losses, truncated
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import FactorizeLinear, Operation, Plan
from grasp_lightning.reading.on_access import merged
from grasp_lightning.stats.base import Statistics, Step, decided_store


class Stored(Protocol):
    """Scores of a finished run; a missing one is a ``ConfigError``."""

    def component_scores(self, module: str, *shape: int) -> Tensor:
        """Return the loss of each component or channel of a linear or of experts, descending."""

    def price(self, name: str) -> float:
        """Return the measured loss of removing a layer or block."""


class BudgetedTruncation(MetricMethod[GlobalRanks]):
    """Spends one budget on the components and channels with the largest loss in a metric."""

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        is_cut = plan.ranks or plan.channels or plan.experts or plan.row_ranks
        if is_cut or plan.removed_blocks or plan.dropped_layers:
            return None
        budgeted = self._rule.budgeted(model, layers)
        self._rule.budget(budgeted)  # refuses what is out of reach
        step = self._curvature_step(model, budgeted.modules, removables=budgeted.removables)
        if not budgeted.rows:
            return step
        ends = measured_vocabulary(model, self._metric)
        return replace(step, needs=replace(step.needs, vocabulary=ends))

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        layers = {model.layer_of(module) for module in step.needs.moments}
        chosen = tuple(index for index in model.layer_indices if index in layers)
        # Without moments of a layer, the removable parts would differ from the priced ones.
        budgeted = replace(self._rule.budgeted(model, chosen), removables=step.needs.removables)
        store = decided_store(stats)
        measured = Measured(model, self._metric, stats.moments, self._track, store)
        losses = component_losses(measured, budgeted.shapes)
        orders = channel_orders(measured, budgeted.mlps)
        losses |= {name: removal.losses.flip(-1) for name, removal in orders.items()}
        ends = step.needs.vocabulary
        rows = ends and MeasuredRows(model, ends, stats.moments)
        losses |= rows.losses(stats.row_losses) if rows else {}
        allocation = self._rule.allocation(budgeted, losses, stats.removal_losses)
        experts = allocation.experts
        ranks = {n: allocation.ranks[n] for n in budgeted.shapes if n in allocation.ranks}
        channels = {n: allocation.channels[n] for n in budgeted.mlps if n in allocation.channels}
        cut = truncated(measured, ranks)
        narrowed = narrowing(measured, budgeted.mlps, orders, channels, experts)
        factored = rows.decision(allocation.ranks) if rows else Decision(operations=())
        removed = removal_operations(budgeted.removables, allocation.removed)
        whole = _without_experts(budgeted, experts, removed)
        smaller = (*whole, *narrowed.operations) if experts else (*narrowed.operations, *removed)
        scores = {f"{name}.scores": value.float() for name, value in losses.items()}
        if self._metric.weighting == "kfac":
            found = self._rule.target_losses(budgeted, losses, stats.removal_losses, view=model)
            scores |= stored_target_losses(found)
        decision = Decision(
            operations=(*cut.operations, *factored.operations, *smaller),
            tensors=merged(cut.tensors, narrowed.tensors, factored.tensors),
            scores={
                **scores,
                **cut.scores,
                **stored_prices(stats.removal_losses),
                **stored_prices(stats.row_losses),
            },
        )
        return self._refitted(decision)

    def stored_target_losses(
        self, view: DecoderView, plan: Plan, stored: Stored
    ) -> dict[str, float]:
        """Return the predicted loss for each target, from what a finished run has stored.

        Empty if the run has other layers, or its losses are not those of this metric.

        Args:
            view: The dense model; its weights may be on the meta device.
            plan: The plan of the run.
            stored: Its scores and prices.
        """
        metric = self._metric.options.items()
        layers = plan.selected_layers
        if layers is None or self._metric.weighting != "kfac" or not metric <= plan.options.items():
            return {}
        budgeted = self._rule.budgeted(view, layers)
        sizes: dict[str, tuple[int, ...]] = {
            name: (min(shape),)
            for name, shape in (*budgeted.shapes.items(), *budgeted.rows.items())
        }
        sizes |= {name: mlp.loss_shape for name, mlp in budgeted.mlps.items()}
        losses = {name: stored.component_scores(name, *size) for name, size in sizes.items()}
        prices = {part.name: stored.price(part.name) for part in budgeted.removables}
        return self._rule.target_losses(budgeted, losses, prices, view=view)

    def predict(self, view: DecoderView) -> Prediction:
        """Return the size that the budget allows; the data decides on ranks and widths."""
        found = super().predict(view)
        is_uniform = self._is_uniform(self._rule.budgeted(view, found.layers))
        return replace(
            found,
            ranks={},
            widths=found.widths if is_uniform else {},
            experts=found.experts if is_uniform else {},
            is_budget=True,
            has_rows=self._rule.embeddings == "factors",
            is_removable=self._rule.removable != "none",
            target=self._rule.target,
        )

    def _is_uniform(self, budgeted: Budgeted) -> bool:
        """Return whether shapes alone decide on the width of all MLPs, or the number of experts."""
        is_uniform = self._rule.target == "plain" and self._rule.removable == "none"
        return is_uniform and (budgeted.mixtures is None or budgeted.keeps_widths)

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        """Return a uniform keep ratio, which takes about as much memory."""
        budgeted = self._rule.budgeted(view, layers)
        kept = self._rule.budget(budgeted)
        size = count_parameters(view.model) - budgeted.size + kept
        if self._rule.target == "any":
            return Outlook(_evenly(budgeted, kept / budgeted.size), size, kept)
        if budgeted.keeps_widths:
            operations = _with_fewer_experts(budgeted, kept)
        else:
            operations = _evenly_narrowed(budgeted, kept, self._rule.unit)
        size = parameters_after(view, operations) if self._is_uniform(budgeted) else size
        widths = Plan(method=self.name, operations=operations).channels
        weights = (budgeted.mlps[name].num_outputs * width for name, width in widths.items())
        return Outlook(operations, size, sum(weights))


def _without_experts(
    budgeted: Budgeted, experts: Mapping[str, tuple[int, ...]], removed: tuple[Operation, ...]
) -> tuple[Operation, ...]:
    """Return removals, and after them those of experts in the remaining layers."""
    gone = {index for operation in removed for index in operation.dropped}
    kept = {name: left for name, left in experts.items() if budgeted.mlps[name].layer not in gone}
    return (*removed, *removals_of_experts(budgeted.mixtures, kept))


def _evenly(budgeted: Budgeted, share: float) -> tuple[Operation, ...]:
    """Return operations that keep the same share of every matrix and MLP."""
    shapes = budgeted.shapes
    size = sum(rows * columns for rows, columns in shapes.values())
    least = sum(factor_parameters(1, *shape) for shape in shapes.values())
    ranks = ranks_for_budget(tuple(shapes.values()), max(int(share * size), least))
    cut = (
        FactorizeLinear(module=name, rank=rank, components=None)
        for name, rank in zip(shapes, ranks, strict=True)
    )
    widths = {
        name: _multiple(int(share * mlp.num_channels), mlp.multiple_of)
        for name, mlp in budgeted.mlps.items()
    }
    return (*cut, *_narrowed_to(budgeted, widths))


def _evenly_narrowed(budgeted: Budgeted, kept: int, unit: int) -> tuple[Operation, ...]:
    """Return operations that keep the same share of every MLP, and everything else."""
    mlps = budgeted.mlps
    size = sum(mlp.num_channels * mlp.channel_size for mlp in mlps.values())
    left = max(size - (budgeted.size - kept), 0)
    widths = {
        name: _multiple(left * mlp.num_channels // size, math.lcm(unit, mlp.multiple_of))
        for name, mlp in mlps.items()
    }
    return _narrowed_to(budgeted, widths)


def _with_fewer_experts(budgeted: Budgeted, kept: int) -> tuple[Operation, ...]:
    """Return operations that remove as few experts as a budget allows, and nothing else."""
    mlps = budgeted.mlps
    losses = {name: torch.zeros(mlp.loss_shape) for name, mlp in mlps.items()}
    for left in choices_of_experts(budgeted.mixtures, mlps, losses):
        saved = sum(
            mlps[name].num_channels * (mlps[name].channel_size - mlps[name].size_of(len(own)))
            + left.sizes[name]
            for name, own in left.kept.items()
        )
        if budgeted.size - saved <= kept:
            return removals_of_experts(budgeted.mixtures, left.kept)
    return ()


def _multiple(width: int, unit: int) -> int:
    """Return the largest multiple up to a width, and at least one unit."""
    return max(width // unit, 1) * unit


def _narrowed_to(budgeted: Budgeted, widths: Mapping[str, int]) -> tuple[Operation, ...]:
    return tuple(
        mlp.operation(torch.arange(widths[name]))
        for name, mlp in budgeted.mlps.items()
        if widths[name] < mlp.num_channels
    )
