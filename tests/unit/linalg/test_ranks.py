import math
import re
from collections.abc import Callable
from random import Random

import pytest
import torch

from grasp_lightning.linalg.ranks import (
    factor_parameters,
    largest_useful_rank,
    rank_for_keep_ratio,
    ranks_by_sensitivity,
    ranks_for_budget,
    removal_weights,
    stays_dense,
    top_components,
)


@pytest.mark.parametrize(
    ("keep_ratio", "out_features", "in_features", "rank"),
    [
        (0.1, 4096, 4096, 204),
        (0.1, 4096, 11008, 298),
        (0.1, 11008, 4096, 298),
        (1.0, 4096, 4096, 2048),
        (1, 3, 6, 2),
        (1e-05, 64, 64, 1),
        (0.5, 1, 1, 1),
    ],
)
def test_rank_of_known_sizes(
    keep_ratio: float, out_features: int, in_features: int, rank: int
) -> None:
    assert rank_for_keep_ratio(keep_ratio, out_features, in_features) == rank


@pytest.mark.parametrize(
    ("keep_ratio", "out_features", "in_features", "rank"),
    [(0.29, 16, 100, 4), (0.7, 45, 90, 21), (0.7, 90, 180, 42), (0.35, 90, 180, 21)],
)
def test_budget_that_is_a_whole_rank_is_used_up(
    keep_ratio: float, out_features: int, in_features: int, rank: int
) -> None:
    in_floating_point = keep_ratio * out_features * in_features / (out_features + in_features)
    assert int(in_floating_point) == rank - 1
    assert rank_for_keep_ratio(keep_ratio, out_features, in_features) == rank


@pytest.mark.parametrize("keep_ratio", [0, 0.0, -0.1, 1.0000001, 10, float("nan"), float("inf")])
def test_keep_ratio_out_of_range_is_refused(keep_ratio: float) -> None:
    message = f"keep_ratio must be above 0 and at most 1, got {keep_ratio}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rank_for_keep_ratio(keep_ratio, 8, 8)


@pytest.mark.parametrize(
    ("keep_ratio", "percent"), [(0.05, 22.8), (0.10, 21.6), (0.15, 20.4), (0.20, 19.2)]
)
def test_eight_layers_of_llama_2_7b_lose_the_share_that_the_paper_setting_gives(
    keep_ratio: float, percent: float
) -> None:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    dense = sum(rows * columns for rows, columns in shapes)
    kept = sum(
        factor_parameters(rank_for_keep_ratio(keep_ratio, *shape), *shape) for shape in shapes
    )
    assert round(100 * 8 * (dense - kept) / 6_738_415_616, 1) == percent


def test_equal_parameters_already_stay_dense() -> None:
    assert stays_dense(2048, 4096, 4096)
    assert not stays_dense(2047, 4096, 4096)


@pytest.mark.parametrize("function", [factor_parameters, stays_dense])
def test_rank_below_one_is_refused(function: Callable[[int, int, int], object]) -> None:
    with pytest.raises(ValueError, match=r"^rank must be at least 1, got 0$"):
        function(0, 8, 8)


@pytest.mark.parametrize(
    "function",
    [
        factor_parameters,
        stays_dense,
        lambda _, m, n: rank_for_keep_ratio(0.5, m, n),
        lambda _, m, n: largest_useful_rank(m, n),
        lambda _, m, n: ranks_for_budget([(m, n)], 1000),
    ],
)
@pytest.mark.parametrize(("out_features", "in_features"), [(0, 5), (5, 0)])
def test_linear_without_outputs_or_inputs_is_refused(
    function: Callable[[int, int, int], object], out_features: int, in_features: int
) -> None:
    message = rf"^a linear needs at least one output and one input, got {out_features} x "
    with pytest.raises(ValueError, match=message):
        function(1, out_features, in_features)


@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"),
    [(4096, 4096, 2047), (3, 6, 1), (6, 7, 3), (2, 2, 0), (1, 4096, 0)],
)
def test_largest_useful_rank_is_the_last_that_saves_parameters(
    out_features: int, in_features: int, rank: int
) -> None:
    assert largest_useful_rank(out_features, in_features) == rank
    assert stays_dense(rank + 1, out_features, in_features)


def test_one_ratio_serves_all_shapes_and_the_rest_goes_to_those_rounded_down_most() -> None:
    # Exact ranks at half the parameters: 8, 10.67 and 4; the second is cut short by 0.67.
    shapes = [(32, 32), (32, 64), (16, 16)]
    at_half = 8 * 64 + 10 * 96 + 4 * 32
    assert ranks_for_budget(shapes, at_half) == [8, 10, 4]
    assert ranks_for_budget(shapes, at_half + 31) == [8, 10, 4]
    assert ranks_for_budget(shapes, at_half + 32) == [8, 10, 5]
    assert ranks_for_budget(shapes, at_half + 96) == [8, 11, 4]


def test_equal_weights_share_what_is_left_over() -> None:
    assert ranks_for_budget([(8, 8)] * 4, 9 * 16) == [3, 2, 2, 2]
    assert ranks_for_budget([(8, 8)] * 4, 11 * 16 + 15) == [3, 3, 3, 2]


def test_a_budget_beyond_all_weights_stops_at_the_largest_useful_ranks() -> None:
    assert ranks_for_budget([(32, 32), (3, 6)], 10_000) == [15, 1]


def test_a_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rank 1 needs 32 parameters, the budget is 31$"):
        ranks_for_budget([(8, 8), (8, 8)], 31)


def test_a_budget_for_no_weights_gives_no_ranks() -> None:
    assert ranks_for_budget([], 5) == []


def test_weights_lose_in_the_proportions_that_are_asked_for() -> None:
    # Exact ranks of full size: 32. Half of all parameters go.
    shapes, half = [(64, 64)] * 3, 3 * 16 * 128
    assert ranks_for_budget(shapes, half, [0.5, 1, 1.5]) == [24, 16, 8]
    assert ranks_for_budget(shapes, half, [1, 1, 1]) == ranks_for_budget(shapes, half)
    assert ranks_for_budget(shapes, half, [0.01, 0.01, 2.98]) == [24, 23, 1]
    assert ranks_for_budget(shapes, 3 * 128, [0.01, 0.01, 2.98]) == [1, 1, 1]


def test_a_larger_loss_means_a_smaller_removal() -> None:
    losses = [10.0, 1e4, 1e7]
    found = removal_weights(losses)
    inverse = [1 / math.log(loss) for loss in losses]
    assert found == [3 * value / sum(inverse) for value in inverse]
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(3)


def test_losses_where_the_logarithm_is_not_above_one_count_alike() -> None:
    assert removal_weights([0.0, 1.0, 2.0, 1e3]) == removal_weights([math.e] * 3 + [1e3])
    assert removal_weights([0.0]) == [1.0]


def test_top_components_come_in_ascending_order() -> None:
    assert top_components(torch.tensor([0.1, 5.0, 0.2, 7.0, 6.0]), 3) == (1, 3, 4)


def test_ties_go_to_the_lower_index_in_long_vectors() -> None:
    assert top_components(torch.ones(5000), 100) == tuple(range(100))


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    message = f"rank must lie in [1, 3], the number of scores, got {rank}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        top_components(torch.ones(3), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_are_refused(value: float) -> None:
    message = f"scores has 1 non-finite entries of 3, the first is {value} at component 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        top_components(torch.tensor([1.0, value, 2.0]), 1)


def test_scores_of_two_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^scores must have shape \(K,\), got \(2, 3\)$"):
        top_components(torch.ones(2, 3), 1)


def searched_as_published(
    shapes: dict[str, tuple[int, int]], losses: dict[str, dict[int, float]], kept: int
) -> dict[str, int]:
    """Bisect the cut in the list of truncations, sorted by falling loss."""
    tried = sorted(
        ((name, rank, losses[name][rank]) for name in losses for rank in losses[name]),
        key=lambda trial: -trial[2],
    )

    def lowest(cut: int) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for name, rank, _ in tried[cut:]:
            ranks[name] = min(ranks.get(name, rank), rank)
        return ranks

    low, high = 0, len(tried)
    while low < high:
        middle = (low + high + 1) // 2
        fits = size_of(shapes, lowest(middle)) <= kept
        low, high = (middle, high) if fits else (low, middle - 1)
    return lowest(low)


def size_of(shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> int:
    return sum(ranks[n] * (a + b) if n in ranks else a * b for n, (a, b) in shapes.items())


def test_a_search_by_sensitivity_is_the_published_one_up_to_its_last_truncation() -> None:
    random = Random(0)
    for _ in range(200):
        shapes = {f"w{i}": (random.randint(8, 60), random.randint(8, 60)) for i in range(6)}
        losses = {
            name: {rank_for_keep_ratio(k / 10, *shape): random.random() for k in range(1, 10)}
            for name, shape in shapes.items()
        }
        lowest = {name: min(ranks) for name, ranks in losses.items()}
        kept = random.randint(size_of(shapes, lowest), size_of(shapes, {}) - 1)
        ranks = ranks_by_sensitivity(shapes, losses, kept)
        assert ranks is not None
        published = searched_as_published(shapes, losses, kept)
        different = [name for name in shapes if ranks.get(name) != published.get(name)]
        assert list(ranks) == [name for name in shapes if name in published]
        assert len(different) <= 1  # the last one goes only as deep as the budget requires
        assert all(ranks[name] > published[name] for name in different)
        assert kept - max(map(sum, shapes.values())) < size_of(shapes, ranks) <= kept


def test_truncations_that_do_not_suffice_give_no_ranks() -> None:
    assert ranks_by_sensitivity({"w": (10, 10)}, {"w": {2: 1.0}}, 40) == {"w": 2}
    assert ranks_by_sensitivity({"w": (10, 10)}, {"w": {2: 1.0}}, 39) is None
    assert ranks_by_sensitivity({"w": (10, 10), "v": (9, 9)}, {"w": {2: 1.0}}, 181 - 60) == {"w": 2}
