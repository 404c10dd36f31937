"""Ranks of all matrices, and channels of all MLPs, from one budget, by predicted loss.

Legend: a size is a number of parameters, or a time. A matrix of ``m`` outputs and ``n`` inputs has
the size ``d`` dense and ``a + b k`` as factors of rank ``k``: counted in parameters, ``m n`` and
``k (m + n)``. At rank ``k`` it loses the *tail*, the sum of its squared singular values after the
first ``k``; dense it loses nothing. An MLP with ``k`` of its channels has the size ``k c``, and
loses the sum of the losses of the others. What is said of matrices below holds for MLPs as well,
with channels for ranks.

For a multiplier ``lambda`` the total ``loss + lambda size`` is a sum over matrices, so each picks
its own option, and a group is removed where that is no dearer than its content. What comes out is
optimal for its own size: an allocation of no larger size has a smaller loss. Sizes grow as
``lambda`` falls, in steps, so a budget is met in two moves: the largest step within it, found by
bisection, and then a greedy fill of what the step leaves over.

Source: Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation
of resources", Operations Research 11 (1963); as for bits in Shoham and Gersho, "Efficient bit
allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 36 (1988).
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Union

import torch
from torch import Tensor

from grasp_lightning.linalg.ranks import largest_useful_rank

_LARGEST_MULTIPLIER = 1e300
_SMALLEST_MULTIPLIER = 1e-300


@dataclass(frozen=True, eq=False)
class MatrixChoice:
    """One matrix, and what it may become: factors of some rank, or dense as it is.

    Attributes:
        name: Unique among all matrices and groups of an allocation.
        shape: Outputs and inputs ``(m, n)``.
        squared_singular_values: Loss that the removal of each component is predicted to cost,
            descending, not negative, ``(K,)``, any float dtype. Losses of all matrices and groups
            need one unit. Components after the last cost nothing.
        min_rank: Smallest rank allowed, at least 1; rounded up to ``multiple_of``.
        max_rank: Largest rank allowed; None allows every rank with fewer parameters than dense. In
            any case, a rank that is no smaller than dense by its size is no option.
        multiple_of: Ranks are multiples of this number.
        rank_size: Size of one rank ``b``, positive; None counts parameters, ``m + n``.
        fixed_size: Size that factors of every rank have besides ``a``, not negative.
        dense_size: Size of the dense matrix ``d``, positive; None counts parameters, ``m n``.
    """

    name: str
    shape: tuple[int, int]
    squared_singular_values: Tensor
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    rank_size: float | None = None
    fixed_size: float = 0.0
    dense_size: float | None = None


@dataclass(frozen=True, eq=False)
class ChannelChoice:
    """One MLP, and what it may become: one with fewer hidden channels, or dense as it is.

    Attributes:
        name: Unique among all matrices, MLPs and groups of an allocation.
        channel_size: Size of one channel ``c``, positive, e.g. the parameters that belong to it.
        losses: Loss that the removal of each channel is predicted to cost beside those after it,
            descending, not negative, one per channel, any float dtype.
        min_channels: Smallest number allowed, at least 1; rounded up to ``multiple_of``.
        multiple_of: Numbers of channels are multiples of this number.
    """

    name: str
    channel_size: float
    losses: Tensor
    min_channels: int = 1
    multiple_of: int = 1


@dataclass(frozen=True, eq=False)
class GroupChoice:
    """Matrices that stand or fall together, as those of a decoder layer or of a block in it.

    Attributes:
        name: Unique among all matrices and groups of an allocation.
        children: Matrices, MLPs and groups in it.
        removal_loss: Loss of removing all of it, measured, in the unit of the matrices' losses;
            may be negative. None where it must stay.
        own_size: Size of what goes with it besides its children, e.g. of its norms.
        removed_size: Size that is left of it when it is removed, e.g. of biases; not negative.
    """

    name: str
    children: Sequence[Union[MatrixChoice, ChannelChoice, "GroupChoice"]]
    removal_loss: float | None = None
    own_size: float = 0.0
    removed_size: float = 0.0


Choice = MatrixChoice | ChannelChoice | GroupChoice


class Allocation(NamedTuple):
    """What becomes of every matrix and group.

    Attributes:
        ranks: Rank of every factorised matrix by its name, sorted by name.
        channels: Number of channels of every narrowed MLP by its name, sorted by name.
        dense: Names of the matrices and MLPs that stay as they are, sorted.
        removed: Names of the removed groups, sorted; without the groups inside them.
        size: Total size of what is kept.
        loss: Total predicted loss.
        multiplier: ``lambda``, loss per unit of size at which the budget is met.
        loss_bound: No allocation of the same budget has a smaller loss than this one.
    """

    ranks: dict[str, int]
    channels: dict[str, int]
    dense: tuple[str, ...]
    removed: tuple[str, ...]
    size: float
    loss: float
    multiplier: float
    loss_bound: float


def allocate(choices: Sequence[Choice], budget: float) -> Allocation:
    """Return the allocation of the smallest loss that a Lagrangian search finds for a budget.

    It never exceeds the budget. What it leaves unspent is too little for the next rank of any kept
    matrix that would lower its loss by it. The loss exceeds the smallest possible by at most
    ``loss - loss_bound``, and a larger budget never has a larger loss. Equal choices are told apart
    by their names, so that the order of ``choices`` has no influence.

    Losses add up: that removing two groups may cost more than the sum of both is not seen.

    Args:
        choices: Matrices, MLPs and groups.
        budget: Largest total size of what is kept. More than everything dense is no error.

    Returns:
        The allocation, with a multiplier of 0 if the budget holds the smallest loss there is.

    Raises:
        ValueError: If the budget is below the smallest allocation or NaN, two names are equal, or a
            choice has a malformed field.
    """
    tree = _prepared(choices)
    least = _solve(tree, math.inf).size
    if not budget >= least:
        raise ValueError(
            f"the budget must be at least {least:.12g}, the smallest size that these choices "
            f"allow, and is of use up to {_dense_size(tree):.12g}, got {budget:.12g}"
        )
    over, within = _bracket(lambda multiplier: _solve(tree, multiplier), budget)
    if over is None:
        return _allocation(within, within.multiplier, within.loss)
    bound = within.loss + within.multiplier * (within.size - budget)
    filled = [_filled(tree, flags, budget) for flags in _between(within.flags, over.flags)]
    best = min((s for s in filled if s is not None), key=lambda s: (s.loss, s.size))
    # Rounding may leave the bound a last bit above the loss of an optimum.
    return _allocation(best, within.multiplier, min(bound, best.loss))


def allocation_at(choices: Sequence[Choice], multiplier: float) -> Allocation:
    """Return the allocation that minimises ``loss + multiplier size``.

    It is optimal for its own size: none of that size or less has a smaller loss. Equal sums go to
    the smaller size.

    Args:
        choices: Matrices, MLPs and groups.
        multiplier: ``lambda``, loss that a unit of size must save to be kept; not negative.

    Returns:
        The allocation, whose loss is its own ``loss_bound``.

    Raises:
        ValueError: If the multiplier is negative or NaN, two names are equal, or a choice has a
            malformed field.
    """
    if not multiplier >= 0:
        raise ValueError(f"multiplier must not be negative, got {multiplier}")
    solution = _solve(_prepared(choices), multiplier)
    return _allocation(solution, multiplier, solution.loss)


def smallest_size(choices: Sequence[Choice]) -> float:
    """Return the smallest total size that some choices allow.

    Args:
        choices: Matrices, MLPs and groups. What ``allocate`` refuses is a ``ValueError``.

    Returns:
        The smallest budget that ``allocate`` takes.
    """
    return _solve(_prepared(choices), math.inf).size


class _Curve:
    """Options of one matrix or MLP, and the lower convex hull of their losses over their sizes.

    Options are in ascending order of size, the last of them dense. Tails of descending values are
    convex, so the hull runs along the ranks up to some rank, and from there straight to dense.

    Args:
        choice: The matrix or MLP.

    Attributes:
        choice: The matrix or MLP.
        name: Of the matrix or MLP.
        ranks: Rank, or number of channels, of every option but dense.
        sizes: Size of every option.
        losses: Loss of every option; 0 for dense.
        hull: Options on the hull.
        slopes: Negated loss that is saved per size between neighbours on the hull, ascending.
    """

    def __init__(self, choice: MatrixChoice | ChannelChoice) -> None:
        _check_curve(choice)
        self.choice, self.name = choice, choice.name
        fixed_size, unit_size, dense_size = _sizes(choice)
        if isinstance(choice, MatrixChoice):
            values, least = choice.squared_singular_values, choice.min_rank
            top = largest_useful_rank(*choice.shape)
            top = top if choice.max_rank is None else min(top, choice.max_rank)
        else:
            values, least, top = choice.losses, choice.min_channels, len(choice.losses) - 1
        values, unit = values.detach().double().cpu(), choice.multiple_of
        ranks = range(-(-least // unit) * unit, top + 1, unit)
        self.ranks = [k for k in ranks if fixed_size + k * unit_size < dense_size]
        tails = torch.zeros(max(top, values.numel()) + 1, dtype=torch.float64)
        tails[: values.numel()] = values.flip(0).cumsum(0).flip(0)
        self.sizes: list[float] = [fixed_size + k * unit_size for k in self.ranks]
        self.sizes.append(float(dense_size))
        self.losses: list[float] = [*tails[self.ranks].tolist(), 0.0]
        self.hull, self.slopes = self._lower_hull()

    def saved_per_size(self, start: int, end: int) -> float:
        """Return the loss that a larger option saves per size."""
        saved = self.losses[start] - self.losses[end]
        return saved / (self.sizes[end] - self.sizes[start])

    def at(self, multiplier: float) -> int:
        """Return the option that minimises ``loss + multiplier size``, of equals the smaller."""
        return self.hull[bisect_left(self.slopes, -multiplier)]

    def larger(self, option: int) -> Iterator[int]:
        """Yield the options that may save most per size after this one: the next, and dense."""
        dense = len(self.ranks)
        if option + 1 < dense:
            yield option + 1
        if option < dense:
            yield dense

    def _lower_hull(self) -> tuple[list[int], list[float]]:
        dense = len(self.ranks)
        if dense == 0:
            return [0], []
        last = min(range(dense), key=lambda option: self.saved_per_size(option, dense))
        hull = [*range(last + 1), dense]
        slopes: list[float] = []
        for start, end in pairwise(hull):
            # Rounding of the tails may leave neighbouring slopes out of order by a last bit.
            slope = -self.saved_per_size(start, end)
            slopes.append(max(slope, slopes[-1]) if slopes else slope)
        return hull, slopes


class _Group(NamedTuple):
    """A group with the curves of its matrices, everything in the order of the names."""

    choice: GroupChoice
    children: "tuple[_Curve | _Group, ...]"


class _Solution(NamedTuple):
    """Best options for one multiplier.

    Attributes:
        options: Kept matrices with the index of their option.
        removed: Names of the removed groups, without those inside them.
        flags: For the name of every removable group, whether it is worth removing by itself.
        size: Total size.
        loss: Total loss.
        multiplier: ``lambda``.
    """

    options: "list[tuple[_Curve, int]]"
    removed: list[str]
    flags: dict[str, bool]
    size: float
    loss: float
    multiplier: float


def _prepared(choices: Sequence[Choice]) -> _Group:
    """Return the choices as one group that must stay."""
    names: set[str] = set()

    def node(choice: Choice) -> "_Curve | _Group":
        if choice.name in names:
            raise ValueError(f"matrices and groups need different names, {choice.name!r} recurs")
        names.add(choice.name)
        return group(choice) if isinstance(choice, GroupChoice) else _Curve(choice)

    def group(choice: GroupChoice) -> _Group:
        sizes = (choice.own_size, choice.removed_size)
        is_finite = all(0 <= size < math.inf for size in sizes)
        if not (is_finite and math.isfinite(choice.removal_loss or 0)):
            raise ValueError(
                f"{choice.name} must have a finite removal_loss or None, got "
                f"{choice.removal_loss}, and a finite own_size and removed_size from 0 on, got "
                f"{choice.own_size} and {choice.removed_size}"
            )
        children = sorted(choice.children, key=lambda child: child.name)
        return _Group(choice, tuple(node(child) for child in children))

    return group(GroupChoice("", choices))


def _sizes(choice: MatrixChoice | ChannelChoice) -> tuple[float, float, float]:
    """Return the sizes ``(a, b, d)``; of an MLP, channels are the ranks."""
    if isinstance(choice, ChannelChoice):
        return 0.0, choice.channel_size, len(choice.losses) * choice.channel_size
    m, n = choice.shape
    rank_size = m + n if choice.rank_size is None else choice.rank_size
    dense_size = m * n if choice.dense_size is None else choice.dense_size
    return choice.fixed_size, rank_size, dense_size


def _dense_size(group: _Group) -> float:
    sizes = [
        child.sizes[-1] if isinstance(child, _Curve) else _dense_size(child)
        for child in group.children
    ]
    return math.fsum([group.choice.own_size, *sizes])


def _solve(
    group: _Group, multiplier: float, removals: Mapping[str, bool] | None = None
) -> _Solution:
    """Return the minimum of ``loss + multiplier size``, of equals the smallest.

    ``removals`` decides for every group, if it is given, instead of its loss.
    """
    options: list[tuple[_Curve, int]] = []
    removed: list[str] = []
    flags: dict[str, bool] = {}
    sizes, losses = [group.choice.own_size], []
    for child in group.children:
        if isinstance(child, _Curve):
            option = child.at(multiplier)
            options.append((child, option))
            sizes.append(child.sizes[option])
            losses.append(child.losses[option])
            continue
        part = _solve(child, multiplier, removals)
        options += part.options
        removed += part.removed
        flags |= part.flags
        sizes.append(part.size)
        losses.append(part.loss)
    # The exactly rounded sum of fsum does not depend on the order.
    kept = _Solution(options, removed, flags, math.fsum(sizes), math.fsum(losses), multiplier)
    return _kept_or_removed(group.choice, kept, removals)


def _kept_or_removed(
    choice: GroupChoice, kept: _Solution, removals: Mapping[str, bool] | None
) -> _Solution:
    if choice.removal_loss is None:
        return kept
    if removals is None:
        # Infinity times a size of zero has no value.
        saved = kept.size - choice.removed_size
        price = kept.multiplier * saved if saved else 0.0
        is_removed = choice.removal_loss <= kept.loss + price
    else:
        is_removed = removals[choice.name]
    flags = kept.flags | {choice.name: is_removed}
    if not is_removed:
        return kept._replace(flags=flags)
    size, loss = choice.removed_size, choice.removal_loss
    return _Solution([], [choice.name], flags, size, loss, kept.multiplier)


def _bracket(
    solve: Callable[[float], _Solution], budget: float
) -> tuple[_Solution | None, _Solution]:
    """Return two solutions that follow each other, the first above and the second within a budget.

    Multipliers are bisected by their logarithms, until two within a factor of two are found, and
    then by themselves to the last bit. None is above if the budget holds the smallest loss.
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


def _between(within: dict[str, bool], over: dict[str, bool]) -> Iterator[dict[str, bool]]:
    """Yield the removals within the budget, and then with one group after the other restored.

    At one multiplier more than one group changes sides only where groups are equal.
    """
    removals = dict(within)
    yield dict(removals)
    for name in sorted(within):
        if removals[name] != over[name]:
            removals[name] = over[name]
            yield dict(removals)


def _filled(tree: _Group, removals: Mapping[str, bool], budget: float) -> _Solution | None:
    """Return the best ranks within a budget for given removals, or None if there are none."""

    def solve(multiplier: float) -> _Solution:
        return _solve(tree, multiplier, removals)

    if solve(math.inf).size > budget:
        return None
    return _fill(_bracket(solve, budget)[1], budget)


def _fill(solution: _Solution, budget: float) -> _Solution:
    """Return a solution with larger options, those that save most per size first.

    An option that does not fit is dropped for good: smaller options of its matrix that are taken
    meanwhile cost what they make it cheaper. Where a larger budget takes an option that is too
    large for a smaller one, it saves no less than the smaller one does by all that it takes
    instead, as that has a lower rate and together a smaller size.
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
    return _with_options(solution, options)


def _with_options(solution: _Solution, options: Sequence[int]) -> _Solution:
    """Return a solution with other options of the kept matrices."""
    size, loss = [solution.size], [solution.loss]
    for (curve, old), new in zip(solution.options, options, strict=True):
        size.append(curve.sizes[new] - curve.sizes[old])
        loss.append(curve.losses[new] - curve.losses[old])
    pairs = [(curve, new) for (curve, _), new in zip(solution.options, options, strict=True)]
    return solution._replace(options=pairs, size=math.fsum(size), loss=math.fsum(loss))


def _allocation(solution: _Solution, multiplier: float, bound: float) -> Allocation:
    options = sorted(solution.options, key=lambda pair: pair[0].name)
    cut = [(c, c.ranks[option]) for c, option in options if option < len(c.ranks)]
    return Allocation(
        ranks={c.name: rank for c, rank in cut if isinstance(c.choice, MatrixChoice)},
        channels={c.name: count for c, count in cut if isinstance(c.choice, ChannelChoice)},
        dense=tuple(c.name for c, option in options if option == len(c.ranks)),
        removed=tuple(sorted(solution.removed)),
        size=solution.size,
        loss=solution.loss,
        multiplier=multiplier,
        loss_bound=bound,
    )


def _check_curve(choice: MatrixChoice | ChannelChoice) -> None:
    is_matrix = isinstance(choice, MatrixChoice)
    field = "squared_singular_values" if is_matrix else "losses"
    values: Tensor = getattr(choice, field)
    is_vector = values.ndim == 1 and values.numel() > 0
    if not is_vector or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(
            f"{field} of {choice.name} must be a vector of finite numbers that are not negative, "
            f"got shape {tuple(values.shape)}"
        )
    if bool((values[1:] > values[:-1]).any()):
        raise ValueError(f"{field} of {choice.name} must be descending")
    for count in ("min_rank" if is_matrix else "min_channels", "multiple_of"):
        if getattr(choice, count) < 1:
            raise ValueError(
                f"{count} of {choice.name} must be at least 1, got {getattr(choice, count)}"
            )
    _check_sizes(choice)


def _check_sizes(choice: MatrixChoice | ChannelChoice) -> None:
    is_matrix = isinstance(choice, MatrixChoice)
    for field in ("rank_size", "dense_size") if is_matrix else ("channel_size",):
        size: float | None = getattr(choice, field)
        if size is not None and not 0 < size < math.inf:
            raise ValueError(f"{field} of {choice.name} must be positive and finite, got {size}")
    if isinstance(choice, MatrixChoice) and not 0 <= choice.fixed_size < math.inf:
        raise ValueError(
            f"fixed_size of {choice.name} must be finite and not negative, got {choice.fixed_size}"
        )
