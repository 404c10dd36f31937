"""Low-rank replacement of chosen layers: layer choice, component score and rank rule as parts."""

from collections.abc import Mapping

from torch import Tensor

from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.factors import SVD, balanced_factors, factorize
from grasp_lightning.linalg.ranks import rank_for_keep_ratio, stays_dense, top_components
from grasp_lightning.methods.base import CompressionMethod, Decision, Track, untracked
from grasp_lightning.methods.drop import DROP, drop_decision, drop_step
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeLinear, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Scoring, Statistics, Step

ATTRIBUTION = "attribution"


def attribution_step(
    model: DecoderView, layers: tuple[int, ...], scoring: Scoring, track: Track = untracked
) -> Step:
    """Return the step that scores every singular component of the linears of some layers.

    Args:
        model: The model.
        layers: Indices of the layers, as in the original model.
        scoring: How components are scored; ``magnitude`` asks for no pass over the data.
        track: Shows the progress of the factorisation.

    Returns:
        The step, with the decomposition of every weight.
    """
    weights = {
        name: linear.weight for index in layers for name, linear in model.linears(index).items()
    }
    bases = {name: factorize(weights[name].detach()) for name in track(list(weights), "factorize")}
    measured = () if scoring.score == "magnitude" else tuple(bases)
    return Step(
        name=ATTRIBUTION,
        needs=Needs(weight_gradients=measured, scoring=scoring),
        layers=layers,
        bases=bases,
    )


def keep_best_components(
    bases: Mapping[str, SVD], scores: Mapping[str, Tensor], keep_ratio: float
) -> Decision:
    """Return the factorisation that keeps the best-scored components of each matrix.

    Args:
        bases: Decomposition of every weight, by module.
        scores: Score of every component, ``(K,)`` per module, larger is kept first.
        keep_ratio: Share of each matrix's parameters that its factors keep.

    Returns:
        One ``FactorizeLinear`` per module with its factors, scores and singular values; a module
        whose factors would not be smaller than its weight is left dense.

    Raises:
        ModelError: If no weight gets smaller.
    """
    operations: list[FactorizeLinear] = []
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for module, basis in bases.items():
        stored[f"{module}.scores"] = scores[module].float().cpu()
        stored[f"{module}.singular_values"] = basis.s.float().cpu()
        rows, columns = basis.u.shape[0], basis.vh.shape[1]
        rank = rank_for_keep_ratio(keep_ratio, rows, columns)
        if stays_dense(rank, rows, columns):
            continue
        components = top_components(scores[module], rank)
        factors = balanced_factors(basis, components)
        tensors[f"{module}.left"], tensors[f"{module}.right"] = factors.left, factors.right
        operations.append(FactorizeLinear(module=module, rank=rank, components=components))
    if not operations:
        raise ModelError(
            f"no linear of the chosen layers gets smaller at keep_ratio {keep_ratio}: "
            "their sides are too short; take other layers or a lower keep_ratio"
        )
    return Decision(operations=tuple(operations), tensors=tensors, scores=stored)


class LowRankMethod(CompressionMethod):
    """Choose layers, score the singular components of their weights, keep the best of each matrix.

    Args:
        name: Name under which the plan and the model card know the combination.
        reference: Publication the combination follows.
        layers: How layers are chosen.
        scoring: How components are scored.
        keep_ratio: Share of each matrix's parameters that its factors keep, in [0, 1); 0 deletes
            the layers.
        track: Shows the progress of factorisations.
    """

    def __init__(
        self,
        *,
        name: str,
        reference: str,
        layers: LayerChoice,
        scoring: Scoring,
        keep_ratio: float,
        track: Track = untracked,
    ) -> None:
        self.name = name
        self.reference = reference
        self._layers = layers
        self._scoring = scoring
        self._keep_ratio = keep_ratio
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        options: dict[str, OptionValue] = {**self._layers.options, "keep_ratio": self._keep_ratio}
        if self._keep_ratio == 0:
            return options
        options["score"] = self._scoring.score
        if self._scoring.score != "magnitude":
            options |= {"terms": self._scoring.terms, "reduction": self._scoring.reduction}
        return options | {"schedule": "one_shot"}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the choice of layers, then the attribution of their components.

        Args:
            model: The model with all operations of the plan applied.
            plan: Decisions so far.

        Returns:
            The next step, or None after the layers were replaced.
        """
        if plan.selected_layers is None:
            return self._layers.step(model)
        if plan.ranks or plan.dropped_layers:
            return None
        if self._keep_ratio == 0:
            return drop_step(plan.selected_layers)
        return attribution_step(model, plan.selected_layers, self._scoring, self._track)

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
        if step.name == DROP:
            return drop_decision(step)
        if self._scoring.score == "magnitude":
            scores: Mapping[str, Tensor] = {name: basis.s for name, basis in step.bases.items()}
        else:
            scores = stats.component_scores
        return keep_best_components(step.bases, scores, self._keep_ratio)
