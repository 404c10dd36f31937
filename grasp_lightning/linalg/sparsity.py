"""Weights set to zero in a pattern, by Wanda and by SparseGPT.

Legend: N output and M input features of a weight W; G mean of x x^T over its inputs x.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Groups = tuple[int, int]
"""A pattern n:m: n of each m consecutive weights of a row are zero."""

BLOCK: Final = 128  # columns that share one threshold in SparseGPT
_DAMPING: Final = 0.01  # share of the mean diagonal of G
_HALVINGS: Final = 64  # more than a float has digits


def zeros_per_row(rows: int, columns: int, sparsity: float) -> int:
    """Return how many weights Wanda sets to zero: ``int(M s)`` in each row."""
    return rows * int(columns * sparsity)


def zeros_per_block(rows: int, columns: int, sparsity: float) -> int:
    """Return how many weights SparseGPT sets to zero: ``int(N B s)`` in each block of B columns."""
    widths = (min(BLOCK, columns - start) for start in range(0, columns, BLOCK))
    return sum(int(rows * width * sparsity) for width in widths)


def smallest_sparsity(num_zeros: Callable[[float], int], target: int) -> float:
    """Return the smallest sparsity in (0, 1) that gives at least ``target`` zeros.

    Args:
        num_zeros: Number of zeros at a sparsity; it never falls, and at the largest float below 1
            it is at least ``target``.
        target: At least 1.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if num_zeros(middle) >= target else (middle, high)
    return high


def wanda(
    weight: Tensor, input_square: Tensor, *, sparsity: float = 0.0, groups: Groups | None = None
) -> Tensor:
    """Return a weight without the elements of lowest ``|W_ij| |X_j|``.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, Eq. 1.

    Args:
        weight: W, ``(N, M)``.
        input_square: Mean of x^2 over tokens, ``(M,)``.
        sparsity: Share of zeros in each row, rounded down to whole elements.
        groups: The pattern n:m instead.

    Returns:
        ``(N, M)``, in the dtype of the weight.
    """
    scores = weight.abs().float() * input_square.sqrt()
    if groups is None:
        zeros = _lowest(scores, int(weight.shape[1] * sparsity))
    else:
        zeros = _lowest(scores.reshape(len(scores), -1, groups[1]), groups[0]).flatten(1)
    return weight.masked_fill(zeros, 0)


def sparse_gpt(
    weight: Tensor, gram: Tensor, *, sparsity: float = 0.0, groups: Groups | None = None
) -> Tensor:
    """Return a weight with zeros, whose other elements make up for them column by column.

    With ``H = G + rho I`` and the upper triangle U, ``U^T U = H^-1``, an element of column j costs
    ``(w / U_jj)^2``. Setting it to zero changes the columns k > j of its row by
    ``- w U_jk / U_jj``. In a block of 128 columns, the elements of lowest cost become zero, all
    rows together; in a pattern n:m, those of each group, after the updates by the columns before.

    Source: Frantar and Alistarh, "SparseGPT", arXiv:2301.00774, Algorithm 1. ``rho`` is 0.01 of the
    mean diagonal of G, as in the public code; its factor 2 in H changes nothing.

    Args:
        weight: W, ``(N, M)``.
        gram: G, ``(M, M)``.
        sparsity: Share of zeros in each block of columns, rounded down to whole elements.
        groups: The pattern n:m instead; m must divide M and 128.

    Returns:
        ``(N, M)``, float64, on the device of the weight.
    """
    upper = _inverse_factor(gram.double())
    kept = weight.double().clone()
    for start in range(0, kept.shape[1], BLOCK):
        end = min(start + BLOCK, kept.shape[1])
        block, factor = kept[:, start:end], upper[start:end, start:end]
        errors = _without_lowest(block, factor, sparsity, groups)
        kept[:, end:] -= errors @ upper[start:end, end:]
    return kept


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper triangle U with ``U^T U = (G + rho I)^-1``."""
    damping = _DAMPING * gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damped = gram + torch.where(damping > 0, damping, 1.0) * identity
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _without_lowest(
    block: Tensor, factor: Tensor, sparsity: float, groups: Groups | None
) -> Tensor:
    """Set elements of a block of columns ``(N, B)`` to zero in place, and correct later columns.

    Returns:
        ``w / U_jj`` of the zeros, and 0 elsewhere, ``(N, B)``.
    """
    diagonal, errors = factor.diagonal(), torch.zeros_like(block)
    if groups is None:
        scores = (block / diagonal).square()
        zeros = _lowest(scores.flatten(), int(scores.numel() * sparsity)).view_as(scores)
    else:
        zeros = torch.zeros_like(block, dtype=torch.bool)
    for column in range(block.shape[1]):
        if groups is not None and column % groups[1] == 0:
            group = slice(column, column + groups[1])
            scores = (block[:, group] / diagonal[group]).square()
            zeros[:, group] = _lowest(scores, groups[0])
        errors[:, column] = block[:, column] * zeros[:, column] / diagonal[column]
        block[:, column:] -= errors[:, column, None] * factor[column, column:]
        block[:, column].masked_fill_(zeros[:, column], 0)  # exactly
    return errors


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` lowest along the last dimension; ties go to the first ones."""
    order = scores.sort(dim=-1, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :count], value=True)
