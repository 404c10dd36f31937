import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.linalg.ranks import (
    factor_parameters,
    largest_useful_rank,
    rank_for_keep_ratio,
    ranks_for_budget,
    stays_dense,
    top_components,
)

quick = settings(max_examples=50, deadline=None)
sizes = st.integers(1, 6000)
# Decimals as a user types them, whose products with the sizes are often exact integers.
keep_ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
# Few distinct values, so that ties are common.
score_lists = st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 1e-30]), min_size=1, max_size=12)
Shapes = list[tuple[int, int]]
shape_lists = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


def cost(ranks: list[int], shapes: Shapes) -> int:
    return sum(rank * (m + n) for rank, (m, n) in zip(ranks, shapes, strict=True))


def largest(shapes: Shapes) -> list[int]:
    """Largest rank of every weight, in exact numbers: below m n / (m + n), but at least 1."""
    return [max(1, math.ceil(Fraction(m * n, m + n)) - 1) for m, n in shapes]


def ranks_at(ratio: Fraction, shapes: Shapes) -> list[int]:
    floors = [math.floor(ratio * Fraction(m * n, m + n)) for m, n in shapes]
    return [min(top, max(1, rank)) for rank, top in zip(floors, largest(shapes), strict=True)]


def best_common_ratio(shapes: Shapes, kept: int) -> Fraction:
    """Try every ratio at which some rank changes, in exact numbers."""
    changes = {
        Fraction(rank * (m + n), m * n)
        for (m, n), top in zip(shapes, largest(shapes), strict=True)
        for rank in range(1, top + 1)
    }
    fitting = [c for c in {Fraction(0), *changes} if cost(ranks_at(c, shapes), shapes) <= kept]
    return max(fitting)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Shapes, int]:
    """Shapes, some of them repeated as in a model, and a budget that is enough for rank 1."""
    shapes = draw(shape_lists) * draw(st.integers(1, 3))
    least = cost([1] * len(shapes), shapes)
    most = max(least, sum(m * n for m, n in shapes))
    return shapes, draw(st.integers(least, most))


@quick
@given(budgets(), st.data())
def test_ranks_stay_within_the_budget_and_nothing_more_fits(
    budget: tuple[Shapes, int], data: st.DataObject
) -> None:
    shapes, kept = budget
    count = len(shapes)
    amounts = st.lists(st.floats(0.01, 10), min_size=count, max_size=count)
    ranks = ranks_for_budget(shapes, kept, data.draw(st.none() | amounts))
    spare = kept - cost(ranks, shapes)
    assert spare >= 0
    for rank, top, (m, n) in zip(ranks, largest(shapes), shapes, strict=True):
        assert 1 <= rank <= top
        assert rank == top or m + n > spare


@quick
@given(budgets())
def test_ranks_have_one_common_ratio_up_to_the_giving_back(budget: tuple[Shapes, int]) -> None:
    shapes, kept = budget
    ranks, floors = ranks_for_budget(shapes, kept), ranks_at(best_common_ratio(*budget), shapes)
    assert all(rank >= floor for rank, floor in zip(ranks, floors, strict=True))
    for each in set(shapes):
        equal = [rank for rank, shape in zip(ranks, shapes, strict=True) if shape == each]
        assert max(equal) - min(equal) <= 1


@quick
@given(budgets(), st.integers(0, 500))
def test_a_larger_budget_spends_no_less_up_to_one_unit(
    budget: tuple[Shapes, int], more: int
) -> None:
    shapes, kept = budget
    first, second = ranks_for_budget(shapes, kept), ranks_for_budget(shapes, kept + more)
    unit = max(m + n for m, n in shapes)
    assert cost(second, shapes) > cost(first, shapes) - unit
    assert best_common_ratio(shapes, kept + more) >= best_common_ratio(shapes, kept)


@quick
@given(shape_lists, keep_ratios.filter(lambda ratio: ratio < 1))
def test_the_cost_of_a_keep_ratio_gives_at_least_its_ranks(
    shapes: Shapes, keep_ratio: float
) -> None:
    useful = [shape for shape in shapes if not stays_dense(1, *shape)]
    ranks = [rank_for_keep_ratio(keep_ratio, *shape) for shape in useful]
    solved = ranks_for_budget(useful, cost(ranks, useful))
    assert cost(solved, useful) == cost(ranks, useful)
    assert all(s >= r for s, r in zip(solved, ranks, strict=True))


@quick
@given(sizes, sizes)
def test_the_largest_useful_rank_is_where_linears_start_to_stay_dense(m: int, n: int) -> None:
    rank = largest_useful_rank(m, n)
    assert stays_dense(rank + 1, m, n)
    assert rank == 0 or not stays_dense(rank, m, n)


@quick
@given(keep_ratios, sizes, sizes)
def test_rank_is_the_largest_within_budget(
    keep_ratio: float, out_features: int, in_features: int
) -> None:
    rank = rank_for_keep_ratio(keep_ratio, out_features, in_features)
    budget = Fraction(round(keep_ratio * 1000), 1000) * out_features * in_features
    assert 1 <= rank <= min(out_features, in_features)
    assert rank == 1 or factor_parameters(rank, out_features, in_features) <= budget
    assert factor_parameters(rank + 1, out_features, in_features) > budget


@quick
@given(keep_ratios, keep_ratios, sizes, sizes)
def test_rank_grows_with_the_keep_ratio(
    first: float, second: float, out_features: int, in_features: int
) -> None:
    lower, higher = sorted((first, second))
    assert rank_for_keep_ratio(lower, out_features, in_features) <= rank_for_keep_ratio(
        higher, out_features, in_features
    )


@quick
@given(keep_ratios, sizes, sizes)
def test_rank_does_not_depend_on_orientation(
    keep_ratio: float, out_features: int, in_features: int
) -> None:
    assert rank_for_keep_ratio(keep_ratio, out_features, in_features) == rank_for_keep_ratio(
        keep_ratio, in_features, out_features
    )


@quick
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 80))
def test_linear_stays_dense_exactly_where_factors_save_nothing(
    rank: int, out_features: int, in_features: int
) -> None:
    threshold = Fraction(out_features * in_features, out_features + in_features)
    assert stays_dense(rank, out_features, in_features) == (rank >= threshold)


@quick
@given(score_lists, st.data())
def test_top_components_equal_a_sort_by_score_then_index(
    values: list[float], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    kept = top_components(torch.tensor(values, dtype=torch.float64), rank)
    assert kept == tuple(sorted(order[:rank]))


@quick
@given(score_lists, st.data())
def test_a_larger_rank_only_adds_components(values: list[float], data: st.DataObject) -> None:
    smaller, larger = sorted(data.draw(st.tuples(*[st.integers(1, len(values))] * 2)))
    scores = torch.tensor(values)
    assert set(top_components(scores, smaller)) <= set(top_components(scores, larger))
