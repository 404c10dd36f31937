"""Attention and MLP blocks in decoder layers, and weights of layers that are half replaced."""

from grasp_lightning.errors import ModelError
from grasp_lightning.methods.rank_rules import RankRule, Shapes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseLinear, in_attention
from grasp_lightning.models.lowrank import LowRankLinear
from grasp_lightning.plan import FactorizeLinear, Plan


def blocks(view: DecoderView, index: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of the dense linears of one layer, MLP block first, attention block second.

    What is not in attention, see ``models.linears.in_attention``, counts as MLP.

    Args:
        view: The model.
        index: The layer's number in the original model.

    Returns:
        Two groups of full names; a group may be empty.
    """
    prefix = f"{view.layers_name}.{index}."
    names = tuple(view.linears(index))
    attention = tuple(name for name in names if in_attention(name.removeprefix(prefix)))
    return tuple(name for name in names if name not in attention), attention


def weight_shapes(view: DecoderView, plan: Plan, layers: tuple[int, ...]) -> Shapes:
    """Return the shapes of all weights of some layers, those that are replaced already included.

    Args:
        view: The model, with all operations of the plan applied.
        plan: Decisions so far.
        layers: Numbers of the layers in the original model.

    Returns:
        ``(N, M)`` by full name, sorted by layer and name. A plan that the model does not have is a
        ``TypeError``.
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
    """Return the ranks of the weights that are still to be replaced.

    Args:
        view: The model, with all operations of the plan applied.
        plan: Decisions so far.
        layers: Numbers of the layers in the original model.
        rule: How many components each weight keeps.

    Returns:
        Rank by full name.

    Raises:
        ModelError: If no weight of the layers gets smaller.
    """
    ranks = rule.ranks(weight_shapes(view, plan, layers))
    if not ranks:
        raise ModelError(
            "no linear of the chosen layers gets smaller: their sides are too short; take other "
            "layers, or a lower keep_ratio"
        )
    return {module: rank for module, rank in ranks.items() if module not in plan.ranks}


def factorize_operations(
    view: DecoderView, layers: tuple[int, ...], rule: RankRule
) -> tuple[FactorizeLinear, ...]:
    """Return what a rule does to the weights of some layers; no components are chosen."""
    ranks = rule.ranks(weight_shapes(view, Plan(method="prediction"), layers))
    return tuple(FactorizeLinear(module=n, rank=k, components=None) for n, k in ranks.items())


def _low_rank(view: DecoderView, name: str) -> LowRankLinear:
    module = view.module(name)
    if not isinstance(module, LowRankLinear):
        raise TypeError(f"the plan replaces {name}, but the model has {type(module).__name__}")
    return module
