from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.linalg.ranks import (
    factor_parameters,
    rank_for_keep_ratio,
    stays_dense,
    top_components,
)

quick = settings(max_examples=50, deadline=None)
sizes = st.integers(1, 6000)
# Decimals as a user types them, whose products with the sizes are often exact integers.
keep_ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
# Few distinct values, so that ties are common.
score_lists = st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 1e-30]), min_size=1, max_size=12)


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
