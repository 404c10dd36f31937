"""Removal of the hidden channels of an MLP, the least needed first.

Legend: ``W`` weight of the linear that reads the channels, ``(N, I)``, with ``N`` outputs and ``I``
channels; ``A`` output metric ``(N, N)`` with root ``L``, ``A = L L^T``; ``C`` the Gram matrix of
the channels, ``(I, I)``. A channel that is not read need not be written: with it go a row of each
linear that writes it and a column of ``W``, and nothing is added, where factors of a matrix need
``k (N + M)`` of ``N M`` parameters.

The others are refitted to stand in for what is removed. With ``C`` damped, kept channels ``K`` and
removed ones ``S``, the weight ``W'`` of the least ``tr(A (W - W') C (W - W')^T)`` is
``W_K + W_S C_SK C_KK^-1``, whatever ``A`` is. In terms of the inverse ``B = C^-1`` the minimum is
``|L^T W_S B_SS^-1/2|^2``, and removal of one channel after the other takes Schur complements of
``B``.

Source: the optimal brain surgeon of Hassibi and Stork (1993), for columns of a weight as in
Kurtic et al., "ZipLM", arXiv:2302.04089; here with the metric ``A`` of a Kronecker-factored
curvature, so that losses are comparable across the layers of a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning.linalg.weightings import (
    damped_cholesky,
    left_weighted,
    root_problem,
    to_dtype,
)

_BLOCKS = 64  # full updates of the inverse: one per channel would move I^3 numbers
_CANDIDATES = 4  # from which a block is drawn, in blocks


class Removal(NamedTuple):
    """Channels in the order in which they go.

    Attributes:
        order: All channels, the least needed first, ``(I,)``, int64.
        losses: What the removal of each costs beside those before it, ``(I,)``, float64, ascending:
            where one costs less than one before it, the larger loss counts for both. Their sum up
            to any channel is no less than the loss of removing all up to it, and equal to it
            where they ascended by themselves.
    """

    order: Tensor
    losses: Tensor


def removal_order(
    weight: Tensor, channel_gram: Tensor, left: Tensor | None, damping: float
) -> Removal:
    """Return all channels in a greedy order: each is the one whose removal costs least by then.

    A loss is the increase of ``tr(A (W - W') C (W - W')^T)`` with the rest refitted, ``C`` damped.
    Equal losses go by the channel's number. Blocks of channels share an update of the inverse: a
    block is drawn, one by one, from the four times as many that cost least at its beginning. That
    loses next to nothing against looking at all of them each time, unless outputs are few, below
    about 32: then a removal changes the order of the others much.

    Args:
        weight: ``W``, ``(N, I)``, finite, any float dtype.
        channel_gram: ``C``, symmetric positive semidefinite ``(I, I)``.
        left: ``L``, lower triangular ``(N, N)``, or ``(N,)`` for a diagonal metric; None for the
            identity.
        damping: Share of the mean of the diagonal of ``C`` that is added to it.

    Returns:
        Order and losses, on the weight's device.

    Raises:
        ValueError: If the shapes do not fit, or ``left`` is no root.
    """
    _check(weight, channel_gram)
    if problem := root_problem("left", left, weight.shape[0]):
        raise ValueError(problem)
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
        chosen, costs = _greedy(
            read[:, candidates],
            inverse[candidates][:, candidates],
            min(block, len(candidates)),
        )
        gone = candidates[chosen]
        order.append(left_over[gone])
        losses.append(costs)
        is_kept = torch.ones(len(left_over), dtype=torch.bool, device=weight.device)
        is_kept[gone] = False
        kept = is_kept.nonzero().squeeze(1)
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        read = read[:, kept] - read[:, gone] @ share
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ share
        left_over = left_over[kept]
    return Removal(torch.cat(order), torch.cat(losses).cummax(0).values)


def narrowed_weight(
    weight: Tensor, channel_gram: Tensor, kept: Sequence[int], damping: float
) -> Tensor:
    """Return the columns of a weight for the kept channels, refitted to stand in for the others.

    Args:
        weight: ``W``, ``(N, I)``, finite, any float dtype.
        channel_gram: ``C``, symmetric positive semidefinite ``(I, I)``.
        kept: Channels that stay, ascending.
        damping: Share of the mean of the diagonal of ``C`` that is added to it.

    Returns:
        ``W'``, ``(N, len(kept))``, contiguous: float64 if ``weight`` is, float32 otherwise.

    Raises:
        ValueError: If the shapes do not fit, or a channel is not there.
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
    # The jitter of the whole matrix, also where its kept part has another mean.
    jitter = damped_cholesky(gram, damping).jitter
    root = torch.linalg.cholesky(gram[keep][:, keep] + jitter * torch.eye(len(keep)).to(gram))
    stand_in = torch.cholesky_solve(gram[keep][:, gone], root)  # (K, S)
    narrowed = full[:, keep] + full[:, gone] @ stand_in.mT
    return narrowed.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def _greedy(read: Tensor, inverse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the positions that cost least, one after the other, and what each of them costs."""
    chosen: list[Tensor] = []
    losses: list[Tensor] = []
    for _ in range(count):
        costs = read.square().sum(0) / inverse.diagonal()
        if chosen:
            costs[torch.stack(chosen)] = torch.inf
        best = costs.argmin()
        chosen.append(best)
        losses.append(costs[best])
        share = inverse[best] / inverse[best, best]
        read = read - read[:, best, None] * share
        inverse = inverse - inverse[:, best, None] * share
        inverse[best, best] = 1.0  # of a channel that is gone: any number but zero
    return torch.stack(chosen), torch.stack(losses)


def _check(weight: Tensor, channel_gram: Tensor) -> None:
    total = weight.shape[-1]
    if weight.ndim != 2 or tuple(channel_gram.shape) != (total, total):  # noqa: PLR2004
        raise ValueError(
            f"weight must be (outputs, channels) and channel_gram (channels, channels), got "
            f"{tuple(weight.shape)} and {tuple(channel_gram.shape)}"
        )
