"""Attention and MLP blocks of decoder layers, and weights of partly replaced layers."""

from grasp_lightning.errors import ModelError
from grasp_lightning.methods.rank_rules import RankRule, Shapes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseLinear, in_attention
from grasp_lightning.models.lowrank import LowRankLinear
from grasp_lightning.plan import FactorizeLinear, Plan


def blocks(view: DecoderView, index: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of a layer's dense linears in two groups, MLP first, then attention.

    Everything outside attention (see ``models.linears.in_attention``) counts as MLP. A group may
    be empty.
    """
    prefix = f"{view.layers_name}.{index}."
    names = tuple(view.linears(index))
    attention = tuple(name for name in names if in_attention(name.removeprefix(prefix)))
    return tuple(name for name in names if name not in attention), attention


def weight_shapes(view: DecoderView, plan: Plan, layers: tuple[int, ...]) -> Shapes:
    """Return ``(N, M)`` of all weights of some layers, including those already replaced.

    Keys are full names, sorted by layer and name. All operations of the plan must be applied to
    the model; a replaced weight that the model lacks is a ``TypeError``.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for index in layers:
        prefix = f"{view.layers_name}.{index}."
        found: dict[str, DenseLinear | LowRankLinear] = {**view.linears(index)}
        found |= {name: _low_rank(view, name) for name in plan.ranks if name.startswith(prefix)}
        shapes |= {n: (found[n].out_features, found[n].in_features) for n in sorted(found)}
    return shapes


def waiting_ranks(
    view: DecoderView, plan: Plan, layers: tuple[int, ...], rule: RankRule
) -> dict[str, int]:
    """Return the rank of every weight that is still to be replaced, by full name.

    All operations of the plan must be applied to the model.

    Raises:
        ModelError: If no weight of the layers gets smaller.
    """
    ranks = rule.ranks(weight_shapes(view, plan, layers))
    if not ranks:
        raise ModelError(
            "no linear of the chosen layers would get smaller: their dimensions are too small; "
            "choose other layers, or a lower keep_ratio"
        )
    return {module: rank for module, rank in ranks.items() if module not in plan.ranks}


def factorize_operations(
    view: DecoderView, layers: tuple[int, ...], rule: RankRule
) -> tuple[FactorizeLinear, ...]:
    """Apply a rule to the weights of some layers, without choosing components."""
    ranks = rule.ranks(weight_shapes(view, Plan(method="prediction"), layers))
    return tuple(FactorizeLinear(module=n, rank=k, components=None) for n, k in ranks.items())


def _low_rank(view: DecoderView, name: str) -> LowRankLinear:
    module = view.module(name)
    if not isinstance(module, LowRankLinear):
        raise TypeError(f"the plan replaces {name}, but the model has {type(module).__name__}")
    return module
