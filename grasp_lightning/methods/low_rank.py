"""Low-rank replacement of chosen layers: layer choice, component score and rank rule as parts."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.config import Schedule
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.factors import SVD, balanced_factors, factorize
from grasp_lightning.linalg.ranks import top_components
from grasp_lightning.methods.base import CompressionMethod, Decision, Track, untracked
from grasp_lightning.methods.blocks import blocks, weight_shapes
from grasp_lightning.methods.drop import DROP, drop_decision, drop_step
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice
from grasp_lightning.methods.rank_rules import RankRule
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import whole
from grasp_lightning.plan import FactorizeLinear, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Scoring, Statistics, Step

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
    weights = {
        name: linear.weight
        for index in model.layer_indices
        for name, linear in model.linears(index).items()
    }
    bases = _factorized({name: weights[name].detach() for name in modules}, track)
    measured = () if scoring.score == "magnitude" else tuple(bases)
    return Step(
        name=ATTRIBUTION,
        needs=Needs(weight_gradients=measured, scoring=scoring),
        bases=bases,
        ranks=ranks,
    )


def _factorized(weights: Mapping[str, Tensor], track: Track) -> dict[str, SVD]:
    """Return the decomposition of every weight; several processes share the work."""
    names, number = list(weights), processes.num_processes()
    own: dict[str, SVD] = {}
    for turn, _ in enumerate(track(names[::number], "factorize")):
        group = names[turn * number :][:number]
        # A sharded weight is brought together by all, one after the other; who is to decompose it
        # keeps it. So they decompose at the same time, and none holds two weights.
        weights_of_group = enumerate(whole(weights[name]) for name in group)
        kept = [weight for owner, weight in weights_of_group if owner == processes.rank()]
        own |= {group[processes.rank()]: factorize(weight) for weight in kept}
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
        rank_rule: RankRule | None,
        schedule: Schedule = "one_shot",
        score_all_layers: bool = False,
        track: Track = untracked,
    ) -> None:
        self.name = name
        self.reference = reference
        self._layers = layers
        self._scoring = scoring
        self._rule = rank_rule
        self._schedule = schedule
        self._score_all_layers = score_all_layers
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        if self._rule is None:
            return {**self._layers.options, "keep_ratio": 0.0}
        options = {**self._layers.options, **self._rule.options, "score": self._scoring.score}
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
        ranks = self._rule.ranks(weight_shapes(model, plan, layers))
        if not ranks:
            raise ModelError(
                "no linear of the chosen layers gets smaller: their sides are too short; take "
                "other layers, or a lower keep_ratio"
            )
        waiting = {module: rank for module, rank in ranks.items() if module not in plan.ranks}
        if not waiting:
            return None
        if self._schedule == "iterative":
            return self._block_step(model, layers, waiting)
        scored = model.layer_indices if self._score_all_layers else layers
        modules = [name for index in scored for name in model.linears(index)]
        return attribution_step(model, modules, self._scoring, ranks=waiting, track=self._track)

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
        del model  # the bases of the step hold what is needed of it
        if step.name == SELECT:
            return self._layers.decide(stats)
        if step.name == DROP or self._rule is None:
            return drop_decision(step)
        if self._scoring.score == "magnitude":
            scores: Mapping[str, Tensor] = {name: basis.s for name, basis in step.bases.items()}
        else:
            scores = stats.component_scores
        ranks = step.ranks
        if ranks is None:
            ranks = self._rule.ranks({name: _shape(basis) for name, basis in step.bases.items()})
        return keep_best_components(step.bases, scores, ranks)


def _shape(basis: SVD) -> tuple[int, int]:
    return basis.u.shape[0], basis.vh.shape[1]
