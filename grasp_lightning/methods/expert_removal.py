"""Experts that are removed under a budget: how many, and which of each mixture.

All mixtures keep the same number, see ``models.expert_numbers``. Each loses the experts with the
smallest price: the predicted loss of removing all their channels. This is the mean over all tokens
of the squared output of an expert, times its router weight, in the metric of the loss. What the
router chooses instead is not counted, nor are biases of outputs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from grasp_lightning.methods.narrowing import Narrowable
from grasp_lightning.models.expert_numbers import NumberedExperts
from grasp_lightning.plan import RemoveExperts

_STEPS = 16  # how many numbers of experts are tried at most


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsLeft:
    """The experts that stay, for one number of experts.

    Attributes:
        kept: Numbers of the kept experts, ascending, by the name of the experts; empty if all are.
        losses: Predicted loss of removing the others of each mixture, by the same names.
        sizes: Parameters that the mixtures lose in their routers and biases, by the same names.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)


def choices_of_experts(
    found: NumberedExperts | None, mlps: Mapping[str, Narrowable], losses: Mapping[str, Tensor]
) -> Iterator[ExpertsLeft]:
    """Yield what stays for each number of experts to try, all of them first.

    Args:
        found: All mixtures; None if their experts cannot be removed.
        mlps: What may lose channels, mixtures by the name of their experts.
        losses: Predicted loss of dropping each channel, of experts ``(E, I)``.
    """
    yield ExpertsLeft()
    if found is None:
        return
    prices = {name: losses[name].double().sum(-1) for name in found.mixtures}
    for left in _numbers(found):
        kept, own, sizes = {}, {}, {}
        for name, mixture in found.mixtures.items():
            kept[name] = _dearest(prices[name], left, found.num_groups)
            own[name] = float(prices[name].sum() - prices[name][list(kept[name])].sum())
            inside = mlps[name].num_channels * mlps[name].channel_size // mlps[name].num_experts
            sizes[name] = float((found.number - left) * (mixture.expert_size - inside))
        yield ExpertsLeft(kept=kept, losses=own, sizes=sizes)


def removals_of_experts(
    found: NumberedExperts | None, kept: Mapping[str, Sequence[int]]
) -> tuple[RemoveExperts, ...]:
    """Return the operations that keep some experts of each mixture."""
    return tuple(
        RemoveExperts(
            mixture=mixture.name,
            experts=name,
            kept=tuple(kept[name]),
            num_experts=mixture.layout.number,
        )
        for name, mixture in (found.mixtures if found else {}).items()
        if name in kept
    )


def _numbers(found: NumberedExperts) -> Iterator[int]:
    """Yield the smaller numbers of experts to try, descending."""
    step = found.num_groups * math.ceil(found.number / (_STEPS * found.num_groups))
    return filter(found.allows, range(found.number - step, 0, -step))


def _dearest(prices: Tensor, left: int, num_groups: int) -> tuple[int, ...]:
    """Return the experts with the largest prices, equally many of each group; ties keep earlier."""
    size = len(prices) // num_groups
    order = prices.reshape(num_groups, size).argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : left // num_groups]
    return tuple(
        sorted(group * size + int(e) for group, row in enumerate(chosen.tolist()) for e in row)
    )
