"""Removal of the hidden channels of an MLP, the least important first.

Legend: ``W`` weight of the linear that reads the channels, ``(N, I)``, with ``N`` outputs and ``I``
channels; ``A`` output metric ``(N, N)`` with root ``L``, ``A = L L^T``; ``C`` the Gram matrix of
the channels, ``(I, I)``. A channel that is not read need not be written: removing it saves a row of
each linear that writes it and a column of ``W``, and adds no parameters, whereas factors of a
matrix need ``k (N + M)`` instead of ``N M``.

The kept channels are refitted to replace the removed ones. With ``C`` damped, kept channels ``K``
and removed ones ``S``, the weight ``W'`` that minimises ``tr(A (W - W') C (W - W')^T)`` is
``W_K + W_S C_SK C_KK^-1``, whatever ``A`` is. In terms of the inverse ``B = C^-1`` the minimum is
``|L^T W_S B_SS^-1/2|^2``, and removing channels one by one takes Schur complements of ``B``.

Source: the optimal brain surgeon of Hassibi and Stork (1993), for columns of a weight as in
Kurtic et al., "ZipLM", arXiv:2302.04089; here with the metric ``A`` of a Kronecker-factored
curvature, so that losses are comparable across the layers of a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning.linalg.weightings import check_root, damped_cholesky, left_weighted, to_dtype

_BLOCKS = 64  # full updates of the inverse; with one per channel, I^3 numbers would be moved
_CANDIDATES = 4  # size of the pool that a block is chosen from, in blocks


class Removal(NamedTuple):
    """Channels in the order of their removal.

    Attributes:
        order: All channels, the least important first, ``(I,)``, int64.
        losses: Additional loss of each removal, ``(I,)``, float64. A running maximum makes them
            ascend, so their sum up to any channel is at least the loss of removing all up to it,
            and equal to it if they ascend anyway.
    """

    order: Tensor
    losses: Tensor


def removal_order(
    weight: Tensor, channel_gram: Tensor, left: Tensor | None, damping: float
) -> Removal:
    """Return all channels in a greedy order: each removal costs least given those before it.

    A loss is the increase of ``tr(A (W - W') C (W - W')^T)`` with the rest refitted, ``C`` damped.
    Ties are broken by the channel's number. Blocks of channels share an update of the inverse: the
    channels of a block are chosen, one by one, from a pool of four times as many that cost least at
    its start. This is almost as good as searching all channels each time, unless there are fewer
    than about 32 outputs: then one removal changes the order of the others considerably.

    Args:
        weight: ``W``, ``(N, I)``, finite, any float dtype.
        channel_gram: ``C``, symmetric positive semidefinite ``(I, I)``.
        left: ``L``, lower triangular ``(N, N)``, or ``(N,)`` for a diagonal metric; None for the
            identity.
        damping: Share of the mean diagonal of ``C`` that is added to its diagonal.
    """
    _check(weight, channel_gram)
    check_root("left", left, weight.shape[0])
    inverse = torch.cholesky_inverse(damped_cholesky(channel_gram, damping).root)
    read = left_weighted(weight.detach().double(), to_dtype(left, torch.float64))
    total = weight.shape[1]
    left_over = torch.arange(total, device=weight.device)
    block = -(-total // _BLOCKS)
    order: list[Tensor] = []
    losses: list[Tensor] = []
    while len(left_over) > 0:
        costs = read.square().sum(0) / inverse.diagonal()
        candidates = costs.argsort(stable=True)[: _CANDIDATES * block].sort().values
        pool = read[:, candidates]
        part = inverse[candidates][:, candidates]
        chosen, costs = _greedy(pool.mT @ pool, part, min(block, len(candidates)))
        gone = candidates[chosen]
        order.append(left_over[gone])
        losses.append(costs)
        is_gone = torch.zeros(len(left_over), dtype=torch.bool, device=weight.device)
        is_gone[gone] = True
        # Their number is known, so a GPU need not report it.
        kept = is_gone.int().argsort(stable=True)[: len(left_over) - len(gone)]
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        read = read[:, kept] - read[:, gone] @ share
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ share
        left_over = left_over[kept]
    return Removal(torch.cat(order), torch.cat(losses).cummax(0).values)


def narrowed_weight(
    weight: Tensor, channel_gram: Tensor, kept: Sequence[int], damping: float
) -> Tensor:
    """Return the columns of a weight for the kept channels, refitted to replace the others.

    Args:
        weight: ``W``, ``(N, I)``, finite, any float dtype.
        channel_gram: ``C``, symmetric positive semidefinite ``(I, I)``.
        kept: Channels to keep, ascending.
        damping: Share of the mean diagonal of ``C`` that is added to its diagonal.

    Returns:
        ``W'``, ``(N, len(kept))``, contiguous: float64 if ``weight`` is, float32 otherwise.

    Raises:
        ValueError: If a channel does not exist.
    """
    _check(weight, channel_gram)
    total = weight.shape[1]
    keep = torch.as_tensor(list(kept), device=weight.device)
    is_gone = torch.ones(total, dtype=torch.bool, device=weight.device)
    if len(keep) == 0 or not bool(((keep >= 0) & (keep < total)).all()):
        raise ValueError(f"kept must name channels from 0 to {total - 1}, got {list(kept)}")
    is_gone[keep] = False
    gone = is_gone.nonzero().squeeze(1)
    gram = channel_gram.detach().double()
    full = weight.detach().double()
    # The jitter of the whole matrix: its kept part may have another mean diagonal.
    jitter = damped_cholesky(gram, damping).jitter
    root = torch.linalg.cholesky(gram[keep][:, keep] + jitter * torch.eye(len(keep)).to(gram))
    stand_in = torch.cholesky_solve(gram[keep][:, gone], root)  # (K, S)
    narrowed = full[:, keep] + full[:, gone] @ stand_in.mT
    return narrowed.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def _greedy(products: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the positions that cost least, one after the other, and the cost of each.

    Nothing is read back from a GPU. A removal changes products of the columns of ``L^T W`` instead
    of the columns: these are longer, and moving them would take most of the time.

    Args:
        products: ``W^T A W`` of the candidates, ``(P, P)``.
        inverse: ``B`` of the candidates, ``(P, P)``; both are overwritten.
        count: Number of positions, at most P.

    Returns:
        Positions and costs, ``(count,)`` each.
    """
    is_gone = torch.zeros(len(products), dtype=torch.bool, device=products.device)
    chosen: list[Tensor] = []
    losses: list[Tensor] = []
    for _ in range(count):
        costs = products.diagonal().clamp_min(0) / inverse.diagonal()
        best = costs.masked_fill(is_gone, torch.inf).argmin(0, keepdim=True)  # (1,)
        chosen.append(best)
        losses.append(costs[best])
        is_gone[best] = True
        row, column = inverse[best], products[:, best]  # (1, P), (P, 1)
        share = row / row[:, best]
        # Every column w_j becomes w_j - w_best share_j.
        products.addmm_(column, share, alpha=-1)
        products.addmm_(share.mT, products[best], alpha=-1)
        inverse.addmm_(row.mT, share, alpha=-1)
        inverse.diagonal()[best] = 1.0  # the channel is removed: any number but zero
    return torch.cat(chosen), torch.cat(losses)


def _check(weight: Tensor, channel_gram: Tensor) -> None:
    total = weight.shape[-1]
    if weight.ndim != 2 or tuple(channel_gram.shape) != (total, total):  # noqa: PLR2004
        raise ValueError(
            f"weight must be (outputs, channels) and channel_gram (channels, channels), got "
            f"{tuple(weight.shape)} and {tuple(channel_gram.shape)}"
        )
