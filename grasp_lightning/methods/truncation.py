"""Truncation of weights in a measured metric."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from grasp_lightning.config import RefitChoice
from grasp_lightning.linalg.factors import SVD, balanced_factors
from grasp_lightning.linalg.weightings import even_norms
from grasp_lightning.methods.base import REFIT_PULL, Decision, Track, untracked
from grasp_lightning.methods.blocks import factorize_operations, waiting_ranks
from grasp_lightning.methods.dealing import dealt, kept
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.prediction import Layers, Outlook, outlook_of
from grasp_lightning.methods.rank_rules import RankRule
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import in_model_order
from grasp_lightning.models.streamed import dense_weights
from grasp_lightning.plan import FactorizeLinear, OptionValue, Plan
from grasp_lightning.reading.on_access import by_full_name
from grasp_lightning.stats.base import (
    DecidedLinears,
    Moments,
    Needs,
    Removable,
    Statistics,
    Step,
    decided_store,
)

CURVATURE = "curvature"
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """Dense weights with their moments, and the metric for changes of them.

    Attributes:
        store: Keeps results; None: they stay in memory.
    """

    view: DecoderView
    metric: Metric
    moments: Mapping[str, Moments]
    track: Track
    store: DecidedLinears | None = None

    def each(
        self,
        modules: Iterable[str],
        work: Callable[[str, Tensor, Moments], Parts],
        description: str,
    ) -> dict[str, Parts]:
        """Apply a function to some weights and their moments; the processes share the work.

        Args:
            modules: Full names of the linears.
            work: Returns tensors by name.
            description: Label of the progress, and of what the store keeps.

        Returns:
            The tensors of each linear; where there is a store, they are read on access.
        """

        def on_device(name: str, weight: Tensor) -> Parts:
            return work(name, weight, self._moments_for(name, weight))

        names = tuple(modules)
        weights, store = dense_weights(self.view, names), self.store
        if store is None:
            return dict(dealt(weights, on_device, self.track, description))
        waiting = store.missing(description, names)
        kept(store, waiting, lambda n: on_device(n, weights[n]), self.track, description)
        return store.load(description, names)

    def basis(self, name: str, weight: Tensor) -> SVD:
        """Return the components of a whole weight ``(N, M)``, both vectors of each of one norm."""
        return even_norms(self.metric.decompose(weight, self._moments_for(name, weight)))

    def _moments_for(self, name: str, weight: Tensor) -> Moments:
        """Return the moments of a linear on the device of its weight."""
        moments = self.moments.get(name)
        found = {field.name: getattr(moments, field.name, None) for field in fields(Moments)}
        return Moments(**{k: None if v is None else v.to(weight.device) for k, v in found.items()})


def component_losses(measured: Measured, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return the loss of each component of some weights, ``(K,)``, descending, float64."""

    def losses(_: str, weight: Tensor, moments: Moments) -> Parts:
        return {"losses": measured.metric.losses(weight, moments).cpu()}

    found = measured.each(modules, losses, "predict losses")
    return {name: parts["losses"] for name, parts in found.items()}


def truncated(measured: Measured, ranks: Mapping[str, int]) -> Decision:
    """Return the optimal factors of some weights; the scores are losses of their components."""
    metric = measured.metric

    def factors_of(name: str, weight: Tensor, moments: Moments) -> Parts:
        basis = even_norms(metric.decompose(weight, moments))
        factors = balanced_factors(basis, range(ranks[name]))
        scores = metric.of_singular_values(basis.s)
        return {
            "left": factors.left.cpu(),
            "right": factors.right.cpu(),
            "singular_values": basis.s.float().cpu(),
            "scores": scores.float().cpu(),
        }

    found = measured.each(ranks, factors_of, "factorize")
    return Decision(
        operations=tuple(
            FactorizeLinear(module=name, rank=ranks[name], components=None) for name in found
        ),
        tensors=by_full_name(found, "left", "right"),
        scores={
            f"{name}.{part}": parts[part]
            for name, parts in found.items()
            for part in ("singular_values", "scores")
        },
    )


class _Rule(Protocol):
    @property
    def options(self) -> Mapping[str, OptionValue]: ...


R = TypeVar("R", bound=_Rule)


class MetricMethod(LayerwiseMethod, Generic[R]):
    """Truncates weights in a measured metric, keeping the largest components.

    Args:
        name: Method name in the plan and the model card.
        reference: Publication of the metric.
        layers: How layers are chosen.
        metric: How much a change of a weight counts.
        rule: How much each weight keeps.
        refit: How the cut weights are refitted.
        refit_pull: How strongly a refit is pulled towards the truncated weights.
        track: Shows the progress of factorisations.
    """

    def __init__(
        self,
        *,
        name: str,
        reference: str,
        layers: LayerChoice,
        metric: Metric,
        rule: R,
        refit: RefitChoice = "none",
        refit_pull: float = REFIT_PULL,
        track: Track = untracked,
    ) -> None:
        super().__init__(name, reference, layers)
        self._metric = metric
        self._rule = rule
        self._refit = refit
        self._refit_pull = refit_pull
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        refit: dict[str, OptionValue] = {}
        if self._refit != "none":
            refit["refit"] = self._refit
            if self._refit_pull != REFIT_PULL:
                refit["refit_pull"] = self._refit_pull
        return {**self._layers.options, **self._rule.options, **self._metric.options, **refit}

    def _refitted(self, decision: Decision) -> Decision:
        """Return a decision with this method's refit."""
        return replace(decision, refit=self._refit, refit_pull=self._refit_pull)

    def _curvature_step(
        self,
        model: DecoderView,
        modules: Collection[str],
        ranks: Mapping[str, int] | None = None,
        removables: tuple[Removable, ...] = (),
    ) -> Step:
        """Return the step that measures what the metric needs for some linears."""
        needs = Needs(
            moments=in_model_order(model, modules),
            moment_kinds=self._metric.moment_kinds,
            fisher=self._metric.fisher,
            removables=removables,
        )
        return Step(name=CURVATURE, needs=needs, ranks=ranks)


class Truncation(MetricMethod[RankRule]):
    """Truncates weights to ranks that depend on their shapes only."""

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        waiting = waiting_ranks(model, plan, layers, self._rule)
        return self._curvature_step(model, waiting, waiting) if waiting else None

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        assert step.ranks is not None  # _step has set them
        store = decided_store(stats)
        measured = Measured(model, self._metric, stats.moments, self._track, store)
        return self._refitted(truncated(measured, self._ranks(step.ranks, measured)))

    def _ranks(self, ranks: Mapping[str, int], measured: Measured) -> Mapping[str, int]:
        """Return the final ranks of some weights, given those that follow from shapes alone."""
        del measured
        return ranks

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        return outlook_of(view, factorize_operations(view, layers, self._rule))
