"""Allocations against all possible ones, listed one by one.

Legend: an outcome is the size and the loss of one combination of options.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.linalg.allocation import Allocation, allocate
from grasp_lightning.linalg.choices import ChannelChoice, Choice, GroupChoice, MatrixChoice
from tests.reference.allocation_at import allocation_at

quick = settings(max_examples=60, deadline=None)
Outcome = tuple[float, float]
# Few distinct values, so that ties are common, and any values.
values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 8.0]), st.floats(1e-6, 1e3))
multipliers = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))
shares = st.floats(0, 1)


def squares(numbers: Sequence[float]) -> torch.Tensor:
    return torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)


@st.composite
def matrices(draw: st.DrawFn, name: str = "m") -> MatrixChoice:
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    min_rank = draw(st.integers(1, 2))
    return MatrixChoice(
        name,
        shape,
        squares(draw(st.lists(values, min_size=min(shape), max_size=min(shape)))),
        min_rank=min_rank,
        max_rank=draw(st.one_of(st.none(), st.integers(min_rank, 4))),
        multiple_of=draw(st.sampled_from([1, 1, 2])),
    )


@st.composite
def mlps(draw: st.DrawFn, name: str = "c") -> ChannelChoice:
    return ChannelChoice(
        name,
        draw(st.one_of(st.integers(1, 12), st.sampled_from([0.5, 7.25]))),
        squares(draw(st.lists(values, min_size=1, max_size=8))),
        min_channels=draw(st.integers(1, 2)),
        multiple_of=draw(st.sampled_from([1, 1, 2])),
    )


@st.composite
def trees(draw: st.DrawFn) -> list[Choice]:
    """Up to four matrices and MLPs, some of them in groups, and groups in a group."""
    kinds = draw(st.lists(st.sampled_from(["matrix", "matrix", "mlp"]), min_size=1, max_size=4))
    leaves: list[Choice] = [
        draw(mlps(f"m{j}")) if kind == "mlp" else draw(matrices(f"m{j}"))
        for j, kind in enumerate(kinds)
    ]
    cut = draw(st.integers(0, len(leaves)))
    groups = [draw(groups_of(leaves[:cut], "inner")), *leaves[cut:]] if cut else leaves
    return [draw(groups_of(groups, "outer"))] if draw(st.booleans()) else groups


@st.composite
def groups_of(draw: st.DrawFn, children: Sequence[Choice], name: str) -> GroupChoice:
    removal_loss = draw(st.one_of(st.none(), values, st.just(-1.0)))
    own_size, removed_size = draw(st.sampled_from([(0.0, 0.0), (7.0, 0.0), (0.0, 3.0)]))
    return GroupChoice(name, children, removal_loss, own_size, removed_size)


def options(choice: MatrixChoice | ChannelChoice) -> dict[int | None, Outcome]:
    """Size and loss for every rank or number of channels, and for dense under None."""
    if isinstance(choice, ChannelChoice):
        unit, losses = choice.channel_size, choice.losses.tolist()
        narrowed: dict[int | None, Outcome] = {
            k: (unit * k, math.fsum(losses[k:]))
            for k in range(choice.min_channels, len(losses))
            if k % choice.multiple_of == 0
        }
        return narrowed | {None: (unit * len(losses), 0.0)}
    m, n = choice.shape
    numbers = choice.squared_singular_values.tolist()
    top = math.inf if choice.max_rank is None else choice.max_rank
    ranks: dict[int | None, Outcome] = {
        k: (k * (m + n), math.fsum(numbers[k:]))
        for k in range(choice.min_rank, min(m, n) + 1)
        if k % choice.multiple_of == 0 and k <= top and k * (m + n) < m * n
    }
    return ranks | {None: (m * n, 0.0)}


def outcomes(choices: Sequence[Choice]) -> list[Outcome]:
    parts = []
    for choice in choices:
        if not isinstance(choice, GroupChoice):
            parts.append(list(options(choice).values()))
            continue
        kept = [(size + choice.own_size, loss) for size, loss in outcomes(choice.children)]
        loss = choice.removal_loss
        removed = [] if loss is None else [(choice.removed_size, loss)]
        parts.append([*kept, *removed])
    combined = itertools.product(*parts)
    return [(math.fsum(s for s, _ in c), math.fsum(x for _, x in c)) for c in combined]


def kept_choices(
    choices: Sequence[Choice], removed: Sequence[str]
) -> list[MatrixChoice | ChannelChoice]:
    kept: list[MatrixChoice | ChannelChoice] = []
    for choice in choices:
        if not isinstance(choice, GroupChoice):
            kept.append(choice)
        elif choice.name not in removed:
            kept += kept_choices(choice.children, removed)
    return kept


def outcome(choices: Sequence[Choice], allocation: Allocation) -> Outcome:
    """Size and loss of an allocation, from its names alone."""
    pairs: list[Outcome] = []

    def visit(choice: Choice) -> None:
        if not isinstance(choice, GroupChoice):
            cut = allocation.ranks if isinstance(choice, MatrixChoice) else allocation.channels
            assert (choice.name in cut) != (choice.name in allocation.dense)
            pairs.append(options(choice)[cut.get(choice.name)])
        elif choice.name in allocation.removed:
            assert choice.removal_loss is not None
            pairs.append((choice.removed_size, choice.removal_loss))
        else:
            pairs.append((choice.own_size, 0.0))
            for child in choice.children:
                visit(child)

    for choice in choices:
        visit(choice)
    return math.fsum(size for size, _ in pairs), math.fsum(loss for _, loss in pairs)


def budget_at(choices: Sequence[Choice], share: float) -> float:
    sizes = [size for size, _ in outcomes(choices)]
    return min(sizes) + share * (max(sizes) - min(sizes))


def smallest_loss(choices: Sequence[Choice], budget: float) -> float:
    return min(loss for size, loss in outcomes(choices) if size <= budget)


def close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-9)


@quick
@given(trees(), multipliers)
def test_separable_minimum_is_the_minimum_over_all_combinations(
    choices: list[Choice], multiplier: float
) -> None:
    allocation = allocation_at(choices, multiplier)
    expected = min(loss + multiplier * size for size, loss in outcomes(choices))
    assert close(allocation.loss + multiplier * allocation.size, expected)
    size, loss = outcome(choices, allocation)
    assert close(size, allocation.size)
    assert close(loss, allocation.loss)


@quick
@given(trees(), multipliers)
def test_budget_of_an_optimum_gives_that_optimum(choices: list[Choice], multiplier: float) -> None:
    optimum = allocation_at(choices, multiplier)
    allocation = allocate(choices, optimum.size)
    assert close(smallest_loss(choices, optimum.size), optimum.loss)
    assert close(allocation.loss, optimum.loss)


@quick
@given(trees(), shares)
def test_budget_is_kept_and_the_loss_is_between_the_optimum_and_its_bound(
    choices: list[Choice], share: float
) -> None:
    budget = budget_at(choices, share)
    allocation = allocate(choices, budget)
    size, loss = outcome(choices, allocation)
    assert close(size, allocation.size)
    assert close(loss, allocation.loss)
    assert allocation.size <= budget
    best = smallest_loss(choices, budget)
    assert allocation.loss_bound <= best + 1e-9 * (1 + abs(best))
    assert best <= allocation.loss + 1e-9 * (1 + abs(best))


@quick
@given(trees(), shares)
def test_gap_is_at_most_the_price_of_the_largest_step(choices: list[Choice], share: float) -> None:
    allocation = allocate(choices, budget_at(choices, share))
    steps = [max(size for size, _ in outcomes([choice])) for choice in choices]
    gap = allocation.loss - allocation.loss_bound
    assert gap <= allocation.multiplier * max(steps) * (1 + 1e-9) + 1e-9


@quick
@given(st.lists(st.tuples(*[st.integers(20, 40)] * 2), min_size=1, max_size=5), shares, st.data())
def test_fine_grained_gap_to_the_exact_knapsack_is_at_most_one_rank(
    shapes: list[tuple[int, int]], share: float, data: st.DataObject
) -> None:
    choices = []
    for j, (m, n) in enumerate(shapes):
        decay, scale = data.draw(st.floats(0.5, 0.95)), data.draw(st.floats(0.1, 10))
        top = (m * n - 1) // (m + n)  # past it all values are zero, so that dense never gains
        numbers = [scale * decay**k for k in range(top)]
        choices.append(MatrixChoice(f"m{j}", (m, n), squares(numbers)))
    units = [m + n for m, n in shapes]
    budget = int(sum(units) + share * sum((m * n) for m, n in shapes))
    best = knapsack([options(choice) for choice in choices], budget)
    allocation = allocate(choices, budget)
    gap = allocation.loss - best
    assert -1e-9 <= gap <= allocation.multiplier * max(units) * (1 + 1e-9) + 1e-9
    # At most one rank of the matrix with the largest unit may remain.
    is_complete = allocation.loss <= 1e-12
    assert is_complete or budget - allocation.size < max(units)


def knapsack(tables: Sequence[dict[int | None, Outcome]], budget: int) -> float:
    """Smallest loss over all combinations of integer sizes within a budget."""
    losses = {0: 0.0}
    for table in tables:
        extended: dict[int, float] = {}
        for (size, loss), (added, more) in itertools.product(losses.items(), table.values()):
            total = size + round(added)
            if total <= budget:
                extended[total] = min(extended.get(total, math.inf), loss + more)
        losses = extended
    return min(losses.values())


@quick
@given(trees(), shares)
def test_what_is_left_is_too_little_for_any_matrix_that_would_gain(
    choices: list[Choice], share: float
) -> None:
    budget = budget_at(choices, share)
    allocation = allocate(choices, budget)
    spare = budget - allocation.size
    for choice in kept_choices(choices, allocation.removed):
        table = options(choice)
        size, loss = table[(allocation.ranks | allocation.channels).get(choice.name)]
        for larger, less in table.values():
            if larger > size and less < loss * (1 - 1e-9):
                assert larger - size > spare - 1e-9


@quick
@given(trees(), shares, shares)
def test_a_larger_budget_never_loses_more(
    choices: list[Choice], first: float, second: float
) -> None:
    lower, higher = sorted((first, second))
    less = allocate(choices, budget_at(choices, lower))
    more = allocate(choices, budget_at(choices, higher))
    assert more.loss <= less.loss + 1e-9 * (1 + abs(less.loss))
    assert more.multiplier <= less.multiplier


@quick
@given(trees(), shares, st.randoms(use_true_random=False))
def test_order_has_no_influence(choices: list[Choice], share: float, shuffler: Random) -> None:
    def shuffled(given_choices: Sequence[Choice]) -> list[Choice]:
        mixed = [
            replace(c, children=shuffled(c.children)) if isinstance(c, GroupChoice) else c
            for c in given_choices
        ]
        shuffler.shuffle(mixed)
        return mixed

    budget = budget_at(choices, share)
    assert allocate(choices, budget) == allocate(shuffled(choices), budget)


@quick
@given(trees(), shares)
def test_ranks_keep_to_their_multiples_and_limits_and_save_size(
    choices: list[Choice], share: float
) -> None:
    allocation = allocate(choices, budget_at(choices, share))
    for choice in kept_choices(choices, allocation.removed):
        assert (allocation.ranks | allocation.channels).get(choice.name) in options(choice)


@quick
@given(matrices(), multipliers)
def test_a_matrix_stays_dense_exactly_where_no_rank_is_as_cheap(
    choice: MatrixChoice, multiplier: float
) -> None:
    prices = {rank: loss + multiplier * size for rank, (size, loss) in options(choice).items()}
    dense = prices.pop(None)
    least = min(prices.values(), default=math.inf)
    is_tie = least == dense or math.isclose(least, dense, rel_tol=1e-9)
    is_dense = allocation_at([choice], multiplier).dense == ("m",)
    assert is_tie or is_dense == (dense < least)


@quick
@given(st.lists(matrices(), min_size=1, max_size=1), values, multipliers)
def test_a_group_is_removed_exactly_where_that_costs_no_more(
    children: list[MatrixChoice], removal_loss: float, multiplier: float
) -> None:
    kept = min(loss + multiplier * size for size, loss in outcomes(children))
    is_tie = math.isclose(kept, removal_loss, rel_tol=1e-9, abs_tol=1e-12)
    allocation = allocation_at([GroupChoice("g", children, removal_loss)], multiplier)
    assert is_tie or (allocation.removed == ("g",)) == (removal_loss < kept)


def test_equal_groups_are_restored_one_by_one() -> None:
    leaf: Callable[[str], MatrixChoice] = lambda name: MatrixChoice(  # noqa: E731
        name, (8, 8), squares([4.0, 3, 2, 1, 1, 1, 1, 1])
    )
    groups = [GroupChoice(f"g{j}", [leaf(f"m{j}")], removal_loss=9.0) for j in range(6)]
    for num_kept in range(7):
        allocation = allocate(groups, 64.0 * num_kept)
        assert allocation.loss <= 9.0 * (6 - num_kept)
