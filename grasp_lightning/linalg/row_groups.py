"""Groups of rows of an embedding: how tokens are grouped, and the factors of one group.

Legend: V tokens, d hidden size. A group has ``n`` rows ``W``, ``(n, d)``; ``w`` is the weight of
each row, ``(n,)``; ``R`` the lower triangular root of the metric of columns, ``C = R R^T``,
``(d, d)``. A change ``D`` of the group costs ``tr(diag(w) D C D^T) = |diag(w)^0.5 D R|^2``.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from grasp_lightning.linalg.weightings import check_root

_NUM_DOUBLINGS: Final = 5
NUM_GROUPS: Final = 1 + _NUM_DOUBLINGS
_ZIPF_SHIFT: Final = 2.7  # Mandelbrot's, of words of English
CHUNK: Final = 8192  # rows in float64 at a time


class RowFactors(NamedTuple):
    """Factors of a group: left ``(n, r)``, right ``(r, d)``, both in float64."""

    left: Tensor
    right: Tensor


def group_sizes(num_tokens: int, num_special: int) -> tuple[int, ...]:
    """Return the number of tokens in each group, the most frequent first.

    The first group is always dense. The others double: V/32, V/16, V/8, V/4, V/2 for a
    vocabulary of V tokens, so that each group holds about as much text as the one before.

    Source: clusters of tokens by frequency, Grave et al., "Efficient softmax approximation for
    GPUs", arXiv:1609.04309, and Baevski and Auli, "Adaptive input representations",
    arXiv:1809.10853. They train matrices of a size chosen beforehand; here a trained matrix is
    factorized, and the predicted loss decides on each rank.

    Args:
        num_tokens: V.
        num_special: Number of tokens that must be in the first group.
    """
    sizes = [num_tokens >> shift for shift in range(_NUM_DOUBLINGS, 0, -1)]
    over = num_special - (num_tokens - sum(sizes))
    for place, size in enumerate(sizes):  # the most frequent ones give way to special tokens
        taken = min(max(over, 0), size)
        sizes[place], over = size - taken, over - taken
    return (num_tokens - sum(sizes), *sizes)


def smoothed_frequencies(counts: Tensor, corpus: Tensor | None = None) -> Tensor:
    """Return how often each token may occur, as shares that sum to 1, ``(V,)``, float64.

    Tokens that a text does not hold are not free: they get the share of text that Good and
    Turing estimate for unseen tokens, the share of tokens seen once. It is spread over all tokens
    as a larger text uses them, or without one by Zipf's law, with ids as ranks, since tokenizers
    number frequent pieces first.

    Args:
        counts: How often a text holds each token, ``(V,)``.
        corpus: How often a larger text holds each; it is smoothed by Zipf's law itself.
    """
    counts = counts.double()
    total = counts.sum().clamp(min=1)
    if corpus is not None:
        prior = smoothed_frequencies(corpus)
    else:
        ranks = torch.arange(len(counts), dtype=torch.float64, device=counts.device)
        prior = 1 / (ranks + _ZIPF_SHIFT)
    # At least one token's share: a short text may repeat all that it holds.
    unseen = ((counts == 1).sum().clamp(min=1) / total).clamp(max=1)
    return (1 - unseen) * counts / total + unseen * prior / prior.sum()


def frequency_groups(frequencies: Tensor, special: Tensor) -> Tensor:
    """Return the group of each token, ``(V,)`` int64; group 0 holds special tokens first.

    Args:
        frequencies: How often each token occurs, ``(V,)``; ties are broken by id.
        special: Ids of tokens that must be in group 0.
    """
    keys = frequencies.double().cpu().clone()
    keys[special] = torch.inf
    order = torch.sort(keys, descending=True, stable=True).indices
    sizes = torch.tensor(group_sizes(len(keys), len(special)))
    groups = torch.empty(len(keys), dtype=torch.int64)
    groups[order] = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return groups


def row_losses(rows: Tensor, weights: Tensor, root: Tensor) -> Tensor:
    """Return the squared singular values of ``diag(w)^0.5 W R``, ``(min(n, d),)``, descending.

    They are the eigenvalues of its Gram matrix, ``(d, d)``, so the cost grows linearly in n.

    Args:
        rows: ``W``, any float dtype.
        weights: ``w``, positive.
        root: ``R``, refused with a ``ValueError`` unless it fits ``check_root``.
    """
    values: Tensor = torch.linalg.eigvalsh(_whitened_gram(rows, weights, root)).flip(0)
    return values[: min(rows.shape)].clamp(min=0)


def row_factors(rows: Tensor, weights: Tensor, root: Tensor, rank: int) -> RowFactors:
    """Return the factors of one rank that cost least; they cost the dropped ``row_losses``.

    With ``Q`` the leading eigenvectors of the whitened Gram matrix, the product is
    ``W R Q Q^T R^-1``. Both vectors of each component get one norm.

    Arguments: see ``row_losses``.
    """
    vectors = torch.linalg.eigh(_whitened_gram(rows, weights, root)).eigenvectors.flip(1)[:, :rank]
    wide = root.double()
    right = torch.linalg.solve_triangular(wide, vectors.mT, upper=False, left=False)  # (r, d)
    left = torch.cat([part.double() @ (wide @ vectors) for part in torch.split(rows, CHUNK)])
    ratio = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
    return RowFactors((left * ratio).contiguous(), (right / ratio[:, None]).contiguous())


def _whitened_gram(rows: Tensor, weights: Tensor, root: Tensor) -> Tensor:
    """Return ``R^T W^T diag(w) W R``, ``(d, d)``, float64."""
    check_root("root", root, rows.shape[1])
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, weight in zip(*(torch.split(part, CHUNK) for part in (rows, weights)), strict=True):
        wide = part.double()
        gram.addmm_(wide.mT, wide * weight.double()[:, None])
    return root.double().mT @ gram @ root.double()
