"""How many singular components to keep, and which.

Legend: a linear of ``m`` outputs and ``n`` inputs has ``m n`` parameters; two factors of rank ``k``
have ``k (m + n)``; the weight has ``K = min(m, n)`` singular components.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

_BISECTIONS = 60  # to the last bit of a ratio in [0, 1]


def rank_for_keep_ratio(keep_ratio: float, out_features: int, in_features: int) -> int:
    """Return the largest rank whose factors stay within a share of the dense parameters.

    The rank is ``max(1, floor(keep_ratio m n / (m + n)))``, computed from the decimal number that
    ``keep_ratio`` prints as: in floating point, 0.7 * 45 * 90 / 135 comes out just below 21. It
    exceeds the budget only if the budget is below rank one.

    Raises:
        ValueError: If ``keep_ratio`` is outside ``(0, 1]``, or a size is below one.
    """
    if not 0 < keep_ratio <= 1:  # also refuses NaN
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
    _check_sizes(out_features, in_features)
    budget = Fraction(str(keep_ratio)) * out_features * in_features
    return max(1, budget // (out_features + in_features))


def factor_parameters(rank: int, out_features: int, in_features: int) -> int:
    """Return the number of parameters of both factors without a bias, ``rank (m + n)``."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    _check_sizes(out_features, in_features)
    return rank * (out_features + in_features)


def stays_dense(rank: int, out_features: int, in_features: int) -> bool:
    """Return whether factors of this rank save nothing: ``k >= m n / (m + n)``."""
    return factor_parameters(rank, out_features, in_features) >= out_features * in_features


def largest_useful_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank that saves parameters, ``ceil(m n / (m + n)) - 1``; may be 0."""
    _check_sizes(out_features, in_features)
    return (out_features * in_features - 1) // (out_features + in_features)


def removal_weights(losses: Sequence[float]) -> list[float]:
    """Return how much of its parameters each weight of one type should lose, relative to the mean.

    Among ``n`` weights with losses ``L``, weight ``i`` loses ``n (1 / log L_i) / sum_j (1 / log
    L_j)`` times the mean share. Losses below ``e``, for which the formula has no meaning or jumps,
    count as ``e``.

    Source: Wang et al., "SVD-LLM V2", arXiv:2503.12340, section 3.1, Algorithm 1.

    Args:
        losses: Frobenius norms of the errors of outputs, truncated at the mean share, at least one.

    Returns:
        Positive numbers with mean 1, in the order of ``losses``.
    """
    inverse = [1 / math.log(max(loss, math.e)) for loss in losses]
    return [len(inverse) * value / sum(inverse) for value in inverse]


def ranks_for_budget(
    shapes: Sequence[tuple[int, int]], kept: int, removal: Sequence[float] | None = None
) -> list[int]:
    """Return the ranks of one common keep ratio that spends a number of parameters.

    The ratio is the largest whose floored ranks stay within the budget. The remainder is spent one
    rank at a time, on the weights that flooring cut most, until less than one unit ``m + n`` of the
    smallest weight below its largest useful rank is left.

    Args:
        shapes: Outputs and inputs ``(m, n)`` of every weight.
        kept: Number of parameters that all factors may have together.
        removal: How much of its parameters each weight loses, in units of the common ratio of
            removal, positive; None is 1 for all.

    Returns:
        Rank of every weight: at least 1, and at most its largest useful rank if that is not 0.

    Raises:
        ValueError: If the budget is below rank 1 everywhere, or a size is below one.
    """
    costs = [factor_parameters(1, *shape) for shape in shapes]
    if kept < sum(costs):
        raise ValueError(f"rank 1 needs {sum(costs)} parameters, the budget is {kept}")
    largest = [max(1, largest_useful_rank(m, n)) for m, n in shapes]

    def floored(ratio: float) -> list[int]:
        targets = zip(_exact_ranks(shapes, ratio, removal), largest, strict=True)
        return [min(top, max(1, math.floor(value))) for value, top in targets]

    # All weights have rank 1 at the lower end.
    low, high = 0.0 if removal is None else 1 - 1 / min(removal), 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_within = _cost(floored(middle), costs) <= kept
        low, high = (middle, high) if is_within else (low, middle)
    ranks, exact = floored(low), _exact_ranks(shapes, low, removal)
    by_remainder = sorted(range(len(shapes)), key=lambda j: ranks[j] - exact[j])
    _spend(kept - _cost(ranks, costs), ranks, costs, largest, by_remainder)
    return ranks


def _exact_ranks(
    shapes: Sequence[tuple[int, int]], ratio: float, removal: Sequence[float] | None
) -> list[float]:
    """Return the real numbers at which factors have their share of the parameters."""
    shares = [ratio] * len(shapes)
    if removal is not None:
        shares = [1 - (1 - ratio) * amount for amount in removal]
    return [share * (m * n / (m + n)) for share, (m, n) in zip(shares, shapes, strict=True)]


def _spend(
    spare: int, ranks: list[int], costs: Sequence[int], largest: Sequence[int], order: Sequence[int]
) -> None:
    """Raise ranks by one in turn, while anything fits."""
    is_spending = True
    while is_spending:
        is_spending = False
        for j in order:
            if costs[j] <= spare and ranks[j] < largest[j]:
                ranks[j] += 1
                spare -= costs[j]
                is_spending = True


def ranks_by_sensitivity(
    shapes: Mapping[str, tuple[int, int]], losses: Mapping[str, Mapping[int, float]], kept: int
) -> dict[str, int] | None:
    """Return the ranks that keep a number of parameters, where single truncations cost least.

    Truncations are accepted in the order of their losses, lowest first, until the parameters are
    few enough. Each weight takes the lowest of its accepted ranks. The last truncation only goes as
    deep as the budget requires, so less than one unit ``m + n`` of its weight is removed in excess.

    Source: Yuan et al., "ASVD", arXiv:2312.05821, the search by sensitivity. Its code finds the
    last accepted truncation by bisection, counts ``keep_ratio m n`` parameters of a weight, and
    truncates the last one as deeply as it was tried.

    Args:
        shapes: Outputs and inputs ``(m, n)`` of every weight.
        losses: Loss of the model with one weight truncated, by weight and rank; equal losses are
            accepted in the order of ``shapes``, higher ranks first. Ranks make weights smaller.
        kept: Number of parameters that all weights may have together.

    Returns:
        Ranks of the truncated weights, in the order of ``shapes``; None if all truncations together
        do not suffice.
    """
    tried = [(losses[n][rank], -rank, n) for n in shapes if n in losses for rank in losses[n]]
    ranks: dict[str, int] = {}
    sizes = {name: m * n for name, (m, n) in shapes.items()}
    excess = sum(sizes.values()) - kept
    for _, negative, name in sorted(tried, key=lambda trial: trial[:2]):
        if excess <= 0:
            break
        unit, rank = sum(shapes[name]), -negative
        if rank < ranks.get(name, math.inf):
            excess -= sizes[name] - rank * unit
            ranks[name] = rank + max(-excess, 0) // unit
            sizes[name] = ranks[name] * unit
    return None if excess > 0 else {name: ranks[name] for name in shapes if name in ranks}


def _cost(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def top_components(scores: Tensor, rank: int) -> tuple[int, ...]:
    """Return the indices of the components with the largest scores, ascending.

    Ties keep the lower index, which has the larger singular value.

    Args:
        scores: One finite score per singular component, ``(K,)``.
        rank: Number of components to keep, in ``[1, K]``.

    Raises:
        ValueError: If ``scores`` is not one-dimensional or not finite, or ``rank`` is out of range.
    """
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (K,), got {tuple(scores.shape)}")
    if not 1 <= rank <= scores.numel():
        raise ValueError(
            f"rank must lie in [1, {scores.numel()}], the number of scores, got {rank}"
        )
    bad = (~scores.isfinite()).nonzero().flatten()
    if len(bad) > 0:
        raise ValueError(
            f"scores has {len(bad)} non-finite entries of {scores.numel()}, the first is "
            f"{scores[bad[0]].item()} at component {bad[0].item()}"
        )
    # Unlike topk, a stable sort has a defined order of ties.
    order = torch.sort(scores, descending=True, stable=True).indices
    return tuple(sorted(order[:rank].tolist()))


def _check_sizes(out_features: int, in_features: int) -> None:
    if min(out_features, in_features) < 1:
        raise ValueError(
            f"a linear needs at least one output and one input, got {out_features} x {in_features}"
        )
