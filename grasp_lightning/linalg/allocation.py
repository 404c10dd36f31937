"""Ranks of all matrices, and channels of all MLPs, for one budget, by predicted loss.

Legend: a size is a number of parameters. A matrix of ``m`` outputs and ``n`` inputs has the size
``m n`` dense and ``k (m + n)`` as factors of rank ``k``. At rank ``k`` it loses the *tail*, the sum
of its squared singular values after the first ``k``; dense it loses nothing. An MLP with ``k`` of
its channels has the size ``k c``, and loses the sum of the losses of the others. Everything below
about matrices and ranks also holds for MLPs and channels.

For a multiplier ``lambda`` the total ``loss + lambda size`` is a sum over matrices, so each takes
its own best option, and a group is removed if that costs no more than keeping it. The result is
optimal for its own size: no allocation of that size or less has a smaller loss. Sizes grow in
steps as ``lambda`` falls, so a budget takes two moves: bisection finds the largest step within it,
and a greedy fill spends the rest.

Source: Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation
of resources", Operations Research 11 (1963); as for bits in Shoham and Gersho, "Efficient bit
allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 36 (1988).
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from grasp_lightning.linalg.choices import (
    ChannelChoice,
    Choice,
    Curve,
    Group,
    GroupChoice,
    MatrixChoice,
    dense_size,
    prepared,
)

_LARGEST_MULTIPLIER = 1e300
_SMALLEST_MULTIPLIER = 1e-300


class Allocation(NamedTuple):
    """The chosen option of every matrix and group.

    Attributes:
        ranks: Rank of every factorised matrix by its name, sorted by name.
        channels: Number of channels of every narrowed MLP by its name, sorted by name.
        dense: Names of the matrices and MLPs that stay dense, sorted.
        removed: Names of the removed groups, sorted, without nested groups.
        size: Total size of the kept parts.
        multiplier: ``lambda``, the loss per unit of size at the budget.
        loss_bound: Lower bound on the loss of every allocation within the budget.
        experts: Numbers of the experts that stay, by the name of those that lose some.
    """

    ranks: dict[str, int]
    channels: dict[str, int]
    dense: tuple[str, ...]
    removed: tuple[str, ...]
    size: float
    loss: float
    multiplier: float
    loss_bound: float
    experts: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def allocate(choices: Sequence[Choice], budget: float) -> Allocation:
    """Return the allocation with the smallest loss that a Lagrangian search finds for a budget.

    It stays within the budget, and the remainder is too small for the next rank that would lower
    the loss of any kept matrix. The loss exceeds the optimum by at most ``loss - loss_bound``, and
    a larger budget never has a larger loss. Ties are broken by name, so the order of ``choices``
    does not matter.

    Losses add up: interactions between two removed groups are ignored.

    Args:
        choices: Matrices, MLPs and groups.
        budget: Largest total size to keep. More than everything dense is no error.

    Returns:
        The allocation, with a multiplier of 0 if the smallest possible loss fits the budget.

    Raises:
        ValueError: If the budget is below the smallest allocation or NaN, two names are equal, or a
            choice has a malformed field.
    """
    tree = prepared(choices)
    least = solve(tree, math.inf).size
    if not budget >= least:
        raise ValueError(
            f"the budget must be at least {least:.12g}, the smallest size that these choices "
            f"allow, and at most {dense_size(tree):.12g} is of use, got {budget:.12g}"
        )
    over, within = _bracket(lambda multiplier: solve(tree, multiplier), budget)
    if over is None:
        return within.allocation(within.loss)
    bound = within.loss + within.multiplier * (within.size - budget)
    filled = [_filled(tree, flags, budget) for flags in _between(within.flags, over.flags)]
    best = min((s for s in filled if s is not None), key=lambda s: (s.loss, s.size))
    # Rounding may put the bound one bit above the optimal loss.
    return best._replace(multiplier=within.multiplier).allocation(min(bound, best.loss))


def smallest_size(choices: Sequence[Choice]) -> float:
    """Return the smallest budget that ``allocate`` accepts."""
    return solve(prepared(choices), math.inf).size


class Solution(NamedTuple):
    """The best options for one multiplier.

    Attributes:
        options: Kept matrices with the index of their option.
        removed: Names of the removed groups, without nested groups.
        flags: For the name of every removable group, whether removing it alone pays off.
    """

    options: list[tuple[Curve, int]]
    removed: list[str]
    flags: dict[str, bool]
    size: float
    loss: float
    multiplier: float

    def allocation(self, loss_bound: float) -> Allocation:
        """Return the allocation of these options, given a lower bound on the loss."""
        options = sorted(self.options, key=lambda pair: pair[0].name)
        cut = [(c, c.ranks[option]) for c, option in options if option < len(c.ranks)]
        return Allocation(
            ranks={c.name: rank for c, rank in cut if isinstance(c.choice, MatrixChoice)},
            channels={c.name: count for c, count in cut if isinstance(c.choice, ChannelChoice)},
            dense=tuple(c.name for c, option in options if option == len(c.ranks)),
            removed=tuple(sorted(self.removed)),
            size=self.size,
            loss=self.loss,
            multiplier=self.multiplier,
            loss_bound=loss_bound,
        )


def solve(group: Group, multiplier: float, removals: Mapping[str, bool] | None = None) -> Solution:
    """Return the minimum of ``loss + multiplier size``; ties take the smaller size.

    ``removals``, if given, decides for every group instead of its loss.
    """
    options: list[tuple[Curve, int]] = []
    removed: list[str] = []
    flags: dict[str, bool] = {}
    sizes, losses = [group.choice.own_size], []
    for child in group.children:
        if isinstance(child, Curve):
            option = child.at(multiplier)
            options.append((child, option))
            sizes.append(child.sizes[option])
            losses.append(child.losses[option])
            continue
        part = solve(child, multiplier, removals)
        options += part.options
        removed += part.removed
        flags |= part.flags
        sizes.append(part.size)
        losses.append(part.loss)
    # The exactly rounded sum of fsum does not depend on the order.
    kept = Solution(options, removed, flags, math.fsum(sizes), math.fsum(losses), multiplier)
    return _kept_or_removed(group.choice, kept, removals)


def _kept_or_removed(
    choice: GroupChoice, kept: Solution, removals: Mapping[str, bool] | None
) -> Solution:
    if choice.removal_loss is None:
        return kept
    if removals is None:
        # Infinity times a size of zero is not defined.
        saved = kept.size - choice.removed_size
        price = kept.multiplier * saved if saved else 0.0
        is_removed = choice.removal_loss <= kept.loss + price
    else:
        is_removed = removals[choice.name]
    flags = kept.flags | {choice.name: is_removed}
    if not is_removed:
        return kept._replace(flags=flags)
    size, loss = choice.removed_size, choice.removal_loss
    return Solution([], [choice.name], flags, size, loss, kept.multiplier)


def _bracket(solve: Callable[[float], Solution], budget: float) -> tuple[Solution | None, Solution]:
    """Return two consecutive solutions, the first above and the second within a budget.

    Multipliers are bisected on a log scale until two are within a factor of two, then linearly to
    the last bit. The first is None if the smallest possible loss fits the budget.
    """
    within = solve(0.0)
    if within.size <= budget:
        return None, within
    low, high = 0.0, _LARGEST_MULTIPLIER
    over, within = within, solve(high)
    while True:
        is_far = high > 2 * max(low, _SMALLEST_MULTIPLIER)
        middle = math.sqrt(max(low, _SMALLEST_MULTIPLIER)) * math.sqrt(high)
        middle = middle if is_far else (low + high) / 2
        if not low < middle < high:
            return over, within
        solution = solve(middle)
        if solution.size <= budget:
            within, high = solution, middle
        else:
            over, low = solution, middle


def _between(within: dict[str, bool], over: dict[str, bool]) -> list[dict[str, bool]]:
    """Return the removals within the budget, then with one group after the other restored.

    Several groups switch at the same multiplier only if they are equal.
    """
    changed = [name for name in sorted(within) if within[name] != over[name]]
    restored = (changed[:count] for count in range(len(changed) + 1))
    return [within | {name: over[name] for name in names} for names in restored]


def _filled(tree: Group, removals: Mapping[str, bool], budget: float) -> Solution | None:
    """Return the best ranks within a budget for given removals; None if there are none."""

    def solution(multiplier: float) -> Solution:
        return solve(tree, multiplier, removals)

    if solution(math.inf).size > budget:
        return None
    return _fill(_bracket(solution, budget)[1], budget)


def _fill(solution: Solution, budget: float) -> Solution:
    """Return a solution with larger options, taking the largest savings per size first.

    An option that does not fit is dropped for good. It never fits later: taking a smaller option of
    the same matrix lowers its extra cost and the remaining budget by the same amount. A larger
    budget never gives a larger loss: an option that fits only the larger budget saves at least as
    much as everything that the smaller budget buys instead, because that has a lower rate and a
    smaller total size.
    """
    curves = [curve for curve, _ in solution.options]
    options = [option for _, option in solution.options]
    heap: list[tuple[float, str, int, int, int]] = []

    def offer(j: int) -> None:
        for option in curves[j].larger(options[j]):
            saved = curves[j].saved_per_size(options[j], option)
            if saved > 0:
                heapq.heappush(heap, (-saved, curves[j].name, option, options[j], j))

    for j in range(len(curves)):
        offer(j)
    spare = budget - solution.size
    while heap:
        _, _, option, start, j = heapq.heappop(heap)
        added = curves[j].sizes[option] - curves[j].sizes[start]
        if start == options[j] and added <= spare:
            options[j] = option
            spare -= added
            offer(j)
    moves = [(curve, old, new) for (curve, old), new in zip(solution.options, options, strict=True)]
    size = math.fsum([solution.size, *(c.sizes[new] - c.sizes[old] for c, old, new in moves)])
    loss = math.fsum([solution.loss, *(c.losses[new] - c.losses[old] for c, old, new in moves)])
    return solution._replace(options=[(c, new) for c, _, new in moves], size=size, loss=loss)
