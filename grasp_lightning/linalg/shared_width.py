"""One number of channels for all MLPs that stay, so that all kept layers have the same shape.

Matrices stay dense, and whole groups may be removed. For a given number of channels, everything has
one size, and removals are a knapsack: those with the smallest loss per size come first, until the
rest is within the budget. That is optimal if all removable groups have the same size, as the layers
of most models do. All numbers of channels are tried.

See ``linalg.allocation`` for the legend.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from grasp_lightning.linalg.allocation import Allocation
from grasp_lightning.linalg.choices import ChannelChoice, Choice, Curve, Group, prepared


class _Part(NamedTuple):
    """What stays or is removed together.

    Attributes:
        fixed: Size of everything but MLPs.
        removal_loss: None if it must stay.
    """

    name: str
    mlps: tuple[Curve, ...]
    matrices: tuple[Curve, ...]
    fixed: float
    removal_loss: float | None
    removed_size: float

    def size(self, option: int) -> float:
        return math.fsum([self.fixed, *(curve.sizes[option] for curve in self.mlps)])

    def loss(self, option: int) -> float:
        return math.fsum(curve.losses[option] for curve in self.mlps)


class _Solution(NamedTuple):
    option: int
    removed: list[str]
    size: float
    loss: float
    loss_bound: float


def allocate_shared(choices: Sequence[Choice], budget: float) -> Allocation:
    """Return the number of channels of all MLPs, and removed groups, with the smallest loss.

    Args:
        choices: MLPs with the same numbers of channels to choose from; matrices, which stay dense;
            and groups of these, without groups inside.
        budget: Largest total size to keep.

    Returns:
        The allocation. Its multiplier is 0: no single one gives it.

    Raises:
        ValueError: If the budget is below ``smallest_shared_size`` or NaN, the MLPs differ, there
            are none, or groups are nested.
    """
    parts = _parts(prepared(choices))
    least = _smallest(parts)
    if not budget >= least:
        raise ValueError(
            f"the budget must be at least {least:.12g}, the smallest size with one number of "
            f"channels for all MLPs, got {budget:.12g}"
        )
    found = [_cheapest(parts, option, budget) for option in range(_num_options(parts))]
    within = [solution for solution in found if solution.size <= budget]
    best = min(within, key=lambda solution: (solution.loss, solution.size))
    kept = [part for part in parts if part.name not in best.removed]
    mlps = sorted((curve for part in kept for curve in part.mlps), key=lambda curve: curve.name)
    matrices = [curve.name for part in kept for curve in part.matrices]
    widths = mlps[0].ranks if mlps else range(0)
    is_cut = best.option < len(widths)
    return Allocation(
        ranks={},
        channels={curve.name: widths[best.option] for curve in mlps} if is_cut else {},
        dense=tuple(sorted(matrices + ([] if is_cut else [curve.name for curve in mlps]))),
        removed=tuple(sorted(best.removed)),
        size=best.size,
        loss=best.loss,
        multiplier=0.0,
        loss_bound=min(solution.loss_bound for solution in within),
    )


def smallest_shared_size(choices: Sequence[Choice]) -> float:
    """Return the smallest budget that ``allocate_shared`` accepts; it raises the same errors."""
    return _smallest(_parts(prepared(choices)))


def _smallest(parts: Sequence[_Part]) -> float:
    return _cheapest(parts, 0, -math.inf).size


def _cheapest(parts: Sequence[_Part], option: int, budget: float) -> _Solution:
    """Return the removals for one number of channels; the size may remain above the budget."""
    size = math.fsum(part.size(option) for part in parts)
    loss = bound = math.fsum(part.loss(option) for part in parts)
    removed = []
    for rate, saved, part in sorted(_removals(parts, option)):
        if rate > 0 and size <= budget:
            break
        bound = loss + rate * (min(saved, size - budget) if rate > 0 else saved)
        size, loss = size - saved, loss + rate * saved
        removed.append(part)
    return _Solution(option, removed, size, loss, bound)


def _removals(parts: Sequence[_Part], option: int) -> Iterator[tuple[float, float, str]]:
    """Yield the loss per size of each removal, the size that it saves, and its name."""
    for part in parts:
        saved = part.size(option) - part.removed_size
        if part.removal_loss is not None and saved > 0:
            yield (part.removal_loss - part.loss(option)) / saved, saved, part.name


def _num_options(parts: Sequence[_Part]) -> int:
    return len(next(curve for part in parts for curve in part.mlps).sizes)


def _parts(tree: Group) -> list[_Part]:
    groups = [child for child in tree.children if isinstance(child, Group)]
    for group in groups:
        if any(isinstance(child, Group) for child in group.children):
            raise ValueError(f"{group.choice.name} has a group inside: expected matrices and MLPs")
    parts = [_part(group) for group in (tree, *groups)]
    widths = {tuple(curve.ranks) for part in parts for curve in part.mlps}
    if len(widths) != 1:
        raise ValueError(
            "one width for all needs MLPs with the same numbers of channels, got "
            f"{len(widths)} different lists of them"
        )
    return parts


def _part(group: Group) -> _Part:
    curves = [child for child in group.children if isinstance(child, Curve)]
    mlps = tuple(curve for curve in curves if isinstance(curve.choice, ChannelChoice))
    matrices = tuple(curve for curve in curves if curve not in mlps)
    choice = group.choice
    return _Part(
        name=choice.name,
        mlps=mlps,
        matrices=matrices,
        fixed=math.fsum([choice.own_size, *(curve.sizes[-1] for curve in matrices)]),
        removal_loss=choice.removal_loss,
        removed_size=choice.removed_size,
    )
