"""Low-rank replacement of chosen layers: layer choice, component score and rank rule as parts."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.config import RefitChoice, Schedule
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.factors import SVD, balanced_factors, factorize
from grasp_lightning.linalg.ranks import top_components
from grasp_lightning.methods.base import CompressionMethod, Decision, Track, untracked
from grasp_lightning.methods.blocks import blocks, weight_shapes
from grasp_lightning.methods.dealing import own_weights
from grasp_lightning.methods.drop import DROP, drop_decision, drop_step
from grasp_lightning.methods.global_ranks import GlobalRanks
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice
from grasp_lightning.methods.narrowing import channel_orders, narrow_operations, narrowing
from grasp_lightning.methods.rank_rules import RankRule
from grasp_lightning.methods.removal import removal_operations, stored_prices
from grasp_lightning.methods.weighted import (
    CURVATURE,
    curvature_step,
    predicted_losses,
    truncation,
)
from grasp_lightning.methods.weighting import Metric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeLinear, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Removable, Scoring, Shape, Statistics, Step

ATTRIBUTION = "attribution"


def attribution_step(
    model: DecoderView,
    modules: Iterable[str],
    scoring: Scoring,
    *,
    ranks: Mapping[str, int] | None = None,
    track: Track = untracked,
) -> Step:
    """Return the step that scores every singular component of some linears.

    Args:
        model: The model.
        modules: Full names of the linears, as in the original model.
        scoring: How components are scored; ``magnitude`` asks for no pass over the data.
        ranks: Ranks that the weights are cut to; None leaves them to the decision.
        track: Shows the progress of the factorisation.

    Returns:
        The step, with the decomposition of every weight.
    """
    linears = model.all_linears()
    bases = _factorized({name: linears[name].weight.detach() for name in modules}, track)
    measured = () if scoring.score == "magnitude" else tuple(bases)
    return Step(
        name=ATTRIBUTION,
        needs=Needs(weight_gradients=measured, scoring=scoring),
        bases=bases,
        ranks=ranks,
    )


def _factorized(weights: Mapping[str, Tensor], track: Track) -> dict[str, SVD]:
    """Return the decomposition of every weight; several processes share the work."""
    number = processes.num_processes()
    own = {name: factorize(weight) for name, weight in own_weights(weights, track, "factorize")}
    if number == 1:
        return own
    bases = {}
    for position, (name, weight) in enumerate(weights.items()):
        basis = own[name] if name in own else _empty_basis(weight)
        bases[name] = SVD(*(processes.from_rank(part, position % number) for part in basis))
    return bases


def _empty_basis(weight: Tensor) -> SVD:
    rows, columns = weight.shape
    count = min(rows, columns)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shapes = ((rows, count), (count,), (count, columns))
    return SVD(*(torch.empty(shape, dtype=dtype, device=weight.device) for shape in shapes))


def keep_best_components(
    bases: Mapping[str, SVD], scores: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> Decision:
    """Return the factorisation that keeps the best-scored components of each matrix.

    Args:
        bases: Decomposition of every weight, by module.
        scores: Score of every component, ``(K,)`` per module, larger is kept first.
        ranks: Number of components to keep, by module; a module that is missing stays dense.

    Returns:
        One ``FactorizeLinear`` per rank with its factors; scores and singular values of all
        modules.
    """
    operations: list[FactorizeLinear] = []
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for module, basis in bases.items():
        stored[f"{module}.scores"] = scores[module].float().cpu()
        stored[f"{module}.singular_values"] = basis.s.float().cpu()
        if module not in ranks:
            continue
        components = top_components(scores[module], ranks[module])
        factors = balanced_factors(basis, components)
        tensors[f"{module}.left"], tensors[f"{module}.right"] = factors.left, factors.right
        operations.append(FactorizeLinear(module=module, rank=ranks[module], components=components))
    return Decision(operations=tuple(operations), tensors=tensors, scores=stored)


class LowRankMethod(CompressionMethod):
    """Choose layers, score the singular components of their weights, keep the best of each matrix.

    Args:
        name: Name under which the plan and the model card know the combination.
        reference: Publication the combination follows.
        layers: How layers are chosen.
        scoring: How components are scored.
        rank_rule: How many components each weight keeps; None deletes the layers.
        metric: Truncate in this measured metric, the largest components first, instead of scoring
            the components of plain decompositions.
        refit: How truncations in a metric are fitted once more.
        schedule: ``one_shot``: all layers in one pass; ``iterative``: the last layer first, MLP
            before attention, each scored with what is above it replaced.
        score_all_layers: Score all layers' components, beyond the chosen ones; one_shot only.
        track: Shows the progress of factorisations.
    """

    def __init__(
        self,
        *,
        name: str,
        reference: str,
        layers: LayerChoice,
        scoring: Scoring,
        rank_rule: RankRule | GlobalRanks | None,
        metric: Metric | None = None,
        refit: RefitChoice = "none",
        schedule: Schedule = "one_shot",
        score_all_layers: bool = False,
        track: Track = untracked,
    ) -> None:
        self.name = name
        self.reference = reference
        self._layers = layers
        self._scoring = scoring
        self._rule = rank_rule
        self._metric = metric
        self._refit = refit
        self._schedule = schedule
        self._score_all_layers = score_all_layers
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        if self._rule is None:
            return {**self._layers.options, "keep_ratio": 0.0}
        options = {**self._layers.options, **self._rule.options}
        if self._metric is not None:
            refit = {} if self._refit == "none" else {"refit": self._refit}
            return {**options, **self._metric.options, **refit}
        options["score"] = self._scoring.score
        if self._scoring.score != "magnitude":
            options |= {"terms": self._scoring.terms, "reduction": self._scoring.reduction}
        return options | {"schedule": self._schedule}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the choice of layers, then the attribution of their components.

        Args:
            model: The model with all operations of the plan applied.
            plan: Decisions so far.

        Returns:
            The next step, or None after the layers were replaced.

        Raises:
            ModelError: If no linear of the chosen layers can get smaller.
        """
        layers = plan.selected_layers
        if layers is None:
            return self._layers.step(model)
        if self._rule is None:
            return None if plan.dropped_layers else drop_step(layers)
        if isinstance(self._rule, GlobalRanks):
            if plan.ranks or plan.channels or plan.removed_blocks or plan.dropped_layers:
                return None
            budgeted = self._rule.budgeted(model, layers)
            self._rule.budget(budgeted)  # refuses what is out of reach
            timed = budgeted.linear_shapes if self._rule.unit == "time" else ()
            return self._curvature_step(model, budgeted.modules, None, timed, budgeted.removables)
        shapes = weight_shapes(model, plan, layers)
        ranks = self._rule.ranks(shapes)
        if not ranks:
            raise ModelError(
                "no linear of the chosen layers gets smaller: their sides are too short; take "
                "other layers, or a lower keep_ratio"
            )
        waiting = {module: rank for module, rank in ranks.items() if module not in plan.ranks}
        return self._cutting_step(model, layers, waiting) if waiting else None

    def _cutting_step(
        self, model: DecoderView, layers: tuple[int, ...], waiting: Mapping[str, int]
    ) -> Step:
        """Return the step that decides on factors of known ranks."""
        if self._metric is not None:
            return self._curvature_step(model, waiting, waiting)
        if self._schedule == "iterative":
            return self._block_step(model, layers, waiting)
        scored = model.layer_indices if self._score_all_layers else layers
        modules = [name for index in scored for name in model.linears(index)]
        return attribution_step(model, modules, self._scoring, ranks=waiting, track=self._track)

    def _curvature_step(
        self,
        model: DecoderView,
        modules: Iterable[str],
        ranks: Mapping[str, int] | None,
        timed: tuple[Shape, ...] = (),
        priced: tuple[Removable, ...] = (),
    ) -> Step:
        assert self._metric is not None  # a global budget comes with one
        asked = set(modules)
        ordered = [name for name in model.all_linears() if name in asked]
        return curvature_step(ordered, self._metric, ranks, timed, priced)

    def _block_step(
        self, model: DecoderView, layers: tuple[int, ...], waiting: Mapping[str, int]
    ) -> Step:
        """Return the step of the highest block that is not replaced yet."""
        index, modules = next(
            (index, group)
            for index in reversed(layers)
            for group in blocks(model, index)
            if any(name in waiting for name in group)
        )
        step = attribution_step(model, modules, self._scoring, ranks=waiting, track=self._track)
        return replace(step, layers=tuple(layer for layer in layers if layer <= index))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the chosen layers, or the kept components of each of their matrices.

        Args:
            step: What ``next_step`` asked for.
            model: The model, as it was measured.
            stats: What was measured.

        Returns:
            The decision of this step.
        """
        if step.name == SELECT:
            return self._layers.decide(stats, model if self._rule is None else None)
        if step.name == DROP or self._rule is None:
            return drop_decision(step)
        if step.name == CURVATURE and self._metric is not None:
            decision = self._truncate(step, model, stats, self._metric)
            return replace(decision, refit=self._refit)
        if self._scoring.score == "magnitude":
            scores: Mapping[str, Tensor] = {name: basis.s for name, basis in step.bases.items()}
        else:
            scores = stats.component_scores
        ranks = step.ranks
        if ranks is None:
            assert not isinstance(self._rule, GlobalRanks)  # it comes with a metric
            ranks = self._rule.ranks({name: _shape(basis) for name, basis in step.bases.items()})
        return keep_best_components(step.bases, scores, ranks)

    def _truncate(
        self, step: Step, model: DecoderView, stats: Statistics, metric: Metric
    ) -> Decision:
        if step.ranks is not None:
            return truncation(model, step.ranks, metric, stats.moments, self._track)
        assert isinstance(self._rule, GlobalRanks)  # other rules know ranks from shapes
        layers = {model.layer_of(module) for module in step.needs.moments}
        chosen = tuple(index for index in model.layer_indices if index in layers)
        # Without moments of a layer, what may go would be other parts than those that were priced.
        budgeted = replace(self._rule.budgeted(model, chosen), removables=step.needs.removables)
        given = (metric, stats.moments, self._track)
        losses = predicted_losses(model, tuple(budgeted.shapes), *given)
        orders = channel_orders(model, tuple(budgeted.mlps), *given)
        losses |= {name: removal.losses.flip(0) for name, removal in orders.items()}
        allocation = self._rule.allocation(
            budgeted, losses, stats.linear_seconds, stats.removal_losses
        )
        ranks = {n: allocation.ranks[n] for n in budgeted.shapes if n in allocation.ranks}
        channels = {n: allocation.channels[n] for n in budgeted.mlps if n in allocation.channels}
        cut = truncation(model, ranks, *given)
        narrow = narrow_operations(orders, budgeted.mlps, channels)
        narrowed = narrowing(model, narrow, *given)
        scores = {f"{name}.scores": value.float() for name, value in losses.items()}
        return Decision(
            operations=(
                *cut.operations,
                *narrowed.operations,
                *removal_operations(budgeted.removables, allocation.removed),
            ),
            tensors={**cut.tensors, **narrowed.tensors},
            scores={**scores, **cut.scores, **stored_prices(stats.removal_losses)},
        )


def _shape(basis: SVD) -> tuple[int, int]:
    return basis.u.shape[0], basis.vh.shape[1]
