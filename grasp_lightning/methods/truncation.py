"""Truncation of weights in a measured metric."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from grasp_lightning.config import RefitChoice
from grasp_lightning.linalg.factors import balanced_factors
from grasp_lightning.linalg.weightings import even_norms
from grasp_lightning.methods.base import Decision, Track, untracked
from grasp_lightning.methods.blocks import factorize_operations, waiting_ranks
from grasp_lightning.methods.dealing import dealt
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.prediction import Layers, Outlook, outlook_of
from grasp_lightning.methods.rank_rules import RankRule
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeLinear, OptionValue, Plan
from grasp_lightning.stats.base import Moments, Needs, Removable, Statistics, Step

CURVATURE = "curvature"


def component_losses(
    view: DecoderView,
    modules: Sequence[str],
    metric: Metric,
    moments: Mapping[str, Moments],
    track: Track,
) -> dict[str, Tensor]:
    """Return what dropping each component of some weights costs; several processes share the work.

    Args:
        view: The dense model.
        modules: Full names of the linears.
        metric: How weights are truncated.
        moments: What was measured, by module.
        track: Shows the progress.

    Returns:
        ``(K,)`` by module, descending, float64, on the CPU.
    """

    def losses(name: str, weight: Tensor) -> Tensor:
        return metric.losses(weight, moments_beside(weight, moments.get(name))).cpu()

    return dict(dealt(weights_of(view, modules), losses, track, "predict losses"))


def truncated(
    view: DecoderView,
    ranks: Mapping[str, int],
    metric: Metric,
    moments: Mapping[str, Moments],
    track: Track,
) -> Decision:
    """Return the best factors of some weights in a metric; several processes share the work.

    Args:
        view: The dense model.
        ranks: Rank by module.
        metric: How weights are truncated.
        moments: What was measured, by module.
        track: Shows the progress.

    Returns:
        One ``FactorizeLinear`` per rank with its factors, and as scores what dropping each
        component costs.
    """

    def factors_of(name: str, weight: Tensor) -> tuple[Tensor, ...]:
        basis = metric.decompose(weight, moments_beside(weight, moments.get(name)))
        factors = balanced_factors(even_norms(basis), range(ranks[name]))
        scores = metric.of_singular_values(basis.s)
        return tuple(part.cpu() for part in (*factors, basis.s, scores))

    operations: list[FactorizeLinear] = []
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, found in dealt(weights_of(view, ranks), factors_of, track, "factorize"):
        left, right, values, scores = found
        tensors |= {f"{name}.left": left, f"{name}.right": right}
        stored |= {f"{name}.singular_values": values.float(), f"{name}.scores": scores.float()}
        operations.append(FactorizeLinear(module=name, rank=ranks[name], components=None))
    return Decision(operations=tuple(operations), tensors=tensors, scores=stored)


def weights_of(view: DecoderView, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights of some dense linears, ``(N, M)``, by full name."""
    linears = view.all_linears()
    return {name: linears[name].weight.detach() for name in modules}


def moments_beside(weight: Tensor, moments: Moments | None) -> Moments:
    """Return what was measured of a linear, on the device of its weight."""
    values = {field.name: getattr(moments, field.name, None) for field in fields(Moments)}
    return Moments(**{k: None if v is None else v.to(weight.device) for k, v in values.items()})


class _Rule(Protocol):
    @property
    def options(self) -> Mapping[str, OptionValue]: ...


R = TypeVar("R", bound=_Rule)


class MetricMethod(LayerwiseMethod, Generic[R]):
    """Truncates weights in a measured metric, the largest components first.

    Args:
        name: Name under which the plan and the model card know the method.
        reference: Publication that the metric follows.
        layers: How layers are chosen.
        metric: How large a change of a weight counts.
        rule: How much each weight keeps.
        refit: How what was cut is fitted once more.
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
        track: Track = untracked,
    ) -> None:
        super().__init__(name, reference, layers)
        self._metric = metric
        self._rule = rule
        self._refit = refit
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        refit = {} if self._refit == "none" else {"refit": self._refit}
        return {**self._layers.options, **self._rule.options, **self._metric.options, **refit}

    def _curvature_step(
        self,
        model: DecoderView,
        modules: Collection[str],
        ranks: Mapping[str, int] | None = None,
        removables: tuple[Removable, ...] = (),
    ) -> Step:
        """Return the step that measures what the metric needs of some linears."""
        needs = Needs(
            moments=tuple(name for name in model.all_linears() if name in modules),
            moment_kinds=self._metric.moment_kinds,
            fisher=self._metric.fisher,
            removables=removables,
        )
        return Step(name=CURVATURE, needs=needs, ranks=ranks)


class Truncation(MetricMethod[RankRule]):
    """Truncates weights to ranks that their shapes tell."""

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        waiting = waiting_ranks(model, plan, layers, self._rule)
        return self._curvature_step(model, waiting, waiting) if waiting else None

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        assert step.ranks is not None  # _step has set them
        cut = truncated(model, step.ranks, self._metric, stats.moments, self._track)
        return replace(cut, refit=self._refit)

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        return outlook_of(view, factorize_operations(view, layers, self._rule))
