"""The step of low-rank methods that truncate in a measured metric."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from torch import Tensor

from grasp_lightning.linalg.factors import balanced_factors
from grasp_lightning.linalg.weightings import even_norms
from grasp_lightning.methods.base import Decision, Track
from grasp_lightning.methods.dealing import dealt
from grasp_lightning.methods.weighting import Metric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeLinear
from grasp_lightning.stats.base import Moments, Needs, Removable, Step

CURVATURE = "curvature"


def curvature_step(
    modules: Sequence[str],
    metric: Metric,
    ranks: Mapping[str, int] | None,
    removables: tuple[Removable, ...] = (),
) -> Step:
    """Return the step that measures what a metric needs of some linears.

    Args:
        modules: Full names of the linears, in model order.
        metric: How weights are truncated.
        ranks: Ranks that they are cut to; None leaves them to the decision.
        removables: Layers and blocks whose price it asks for.

    Returns:
        The step.
    """
    needs = Needs(
        moments=tuple(modules),
        moment_kinds=metric.moment_kinds,
        fisher=metric.fisher,
        removables=removables,
    )
    return Step(name=CURVATURE, needs=needs, ranks=ranks)


def predicted_losses(
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


def truncation(
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
    """Return the weights of some dense linears, ``(N, M)``, by full name.

    Args:
        view: The model.
        modules: Full names of the linears.

    Returns:
        Weights without autograd history, in the order of the names.
    """
    linears = view.all_linears()
    return {name: linears[name].weight.detach() for name in modules}


def moments_beside(weight: Tensor, moments: Moments | None) -> Moments:
    """Return what was measured of a linear, on the device of its weight.

    Args:
        weight: The weight.
        moments: What was measured; None for nothing.

    Returns:
        The moments.
    """
    values = {field.name: getattr(moments, field.name, None) for field in fields(Moments)}
    return Moments(**{k: None if v is None else v.to(weight.device) for k, v in values.items()})
