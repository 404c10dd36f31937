"""Gradient scores of singular components, and factors of the best components."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.linalg.factors import SVD, balanced_factors, factorize
from grasp_lightning.linalg.ranks import top_components
from grasp_lightning.methods.base import Decision, Track, untracked
from grasp_lightning.methods.dealing import own_weights
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.streamed import dense_weights, streamed_weights
from grasp_lightning.plan import FactorizeLinear
from grasp_lightning.stats.base import Needs, Scoring, Step

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
        modules: Full names of the linears in the original model.
        scoring: How components are scored; ``magnitude`` needs no pass over the data.
        ranks: Ranks to cut the weights to; None leaves them to the decision.
        track: Shows the progress of the factorisation.
    """
    bases = _factorized(dense_weights(model, modules), track)
    if streamed_weights(model.model) is not None:  # the device holds one layer at a time
        bases = {name: SVD(*(part.cpu() for part in basis)) for name, basis in bases.items()}
    measured = () if scoring.score == "magnitude" else tuple(bases)
    needs = Needs(weight_gradients=measured, scoring=scoring)
    return Step(name=ATTRIBUTION, needs=needs, bases=bases, ranks=ranks)


def _factorized(weights: Mapping[str, Tensor], track: Track) -> dict[str, SVD]:
    """Factorize every weight; the processes share the work."""
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


def stored_scores(bases: Mapping[str, SVD], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores and singular values by their storage names, float32 on the CPU."""
    stored: dict[str, Tensor] = {}
    for module, basis in bases.items():
        stored[f"{module}.scores"] = scores[module].float().cpu()
        stored[f"{module}.singular_values"] = basis.s.float().cpu()
    return stored


def keep_best_components(
    bases: Mapping[str, SVD], scores: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> Decision:
    """Factorise each matrix and keep its best-scored components; store the scores of all matrices.

    Args:
        bases: Decomposition of every weight, by module.
        scores: Score of every component, ``(K,)`` per module; the largest are kept.
        ranks: Number of components to keep, by module; a missing module stays dense.
    """
    operations: list[FactorizeLinear] = []
    tensors: dict[str, Tensor] = {}
    for module, basis in bases.items():
        if module not in ranks:
            continue
        components = top_components(scores[module], ranks[module])
        factors = balanced_factors(basis, components)
        tensors[f"{module}.left"], tensors[f"{module}.right"] = factors.left, factors.right
        operations.append(FactorizeLinear(module=module, rank=ranks[module], components=components))
    return Decision(
        operations=tuple(operations), tensors=tensors, scores=stored_scores(bases, scores)
    )
