"""How many singular components are kept, and which.

Legend: a linear of ``m`` outputs and ``n`` inputs has ``m n`` parameters; two factors of rank ``k``
have ``k (m + n)``; the weight has ``K = min(m, n)`` singular components.
"""

from fractions import Fraction

import torch
from torch import Tensor


def rank_for_keep_ratio(keep_ratio: float, out_features: int, in_features: int) -> int:
    """Return the largest rank whose factors stay within a share of the dense parameters.

    The rank is ``max(1, floor(keep_ratio m n / (m + n)))``, computed on the decimal number that
    ``keep_ratio`` prints as: in floating point 0.7 * 45 * 90 / 135 = 21 falls just short of 21.

    Args:
        keep_ratio: Share of the matrix's parameters that its factors keep, in ``(0, 1]``.
        out_features: Outputs of the linear.
        in_features: Inputs of the linear.

    Returns:
        Rank in ``[1, K]``. It exceeds the budget only where the budget is below rank one.

    Raises:
        ValueError: If ``keep_ratio`` is outside ``(0, 1]``, or a size is below one.
    """
    if not 0 < keep_ratio <= 1:  # also refuses NaN
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
    _check_sizes(out_features, in_features)
    budget = Fraction(str(keep_ratio)) * out_features * in_features
    return max(1, budget // (out_features + in_features))


def factor_parameters(rank: int, out_features: int, in_features: int) -> int:
    """Return the number of parameters of both factors, without a bias.

    Args:
        rank: Inner dimension of the factors.
        out_features: Outputs of the linear.
        in_features: Inputs of the linear.

    Returns:
        ``rank (m + n)``.

    Raises:
        ValueError: If the rank or a size is below one.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    _check_sizes(out_features, in_features)
    return rank * (out_features + in_features)


def stays_dense(rank: int, out_features: int, in_features: int) -> bool:
    """Tell whether factors of this rank would save nothing: ``k >= m n / (m + n)``.

    Args:
        rank: Inner dimension of the factors.
        out_features: Outputs of the linear.
        in_features: Inputs of the linear.

    Returns:
        True where the factors have at least as many parameters as the dense weight.
    """
    return factor_parameters(rank, out_features, in_features) >= out_features * in_features


def top_components(scores: Tensor, rank: int) -> tuple[int, ...]:
    """Return the indices of the components with the largest scores.

    Args:
        scores: One finite score per singular component, ``(K,)``.
        rank: Number of components to keep, in ``[1, K]``.

    Returns:
        ``rank`` indices, ascending; of equal scores the lower index, which has the larger
        singular value, is kept.

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
