"""How far decoder layers turn hidden states: sums over tokens.

Legend: ``B`` windows, ``T`` tokens of each, ``D`` hidden size. The sums are float64, so that they
can be added over batches and processes and divided once by the number of tokens.
"""

import math

import torch
from torch import Tensor


def cosine_sum(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over tokens of the cosine between two hidden states.

    Args:
        hidden_in: Hidden states entering the layer, ``(B, T, D)``, any float dtype.
        hidden_out: Hidden states leaving it, ``(B, T, D)``, same dtype.
        mask: True where a token is real, False where it is padding, ``(B, T)``, bool.

    Returns:
        Float64 scalar in ``[-n, n]`` for ``n`` real tokens, without autograd history; exactly
        ``n`` where nothing changes. A hidden state of zeros counts as orthogonal to all others.

    Raises:
        ValueError: If the shapes do not fit together, or ``mask`` is not bool.
    """
    if problem := _shape_problem(hidden_in, hidden_out, mask):
        raise ValueError(problem)
    return _masked_sum(_cosines(hidden_in, hidden_out), mask)


def angular_distance_sum(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over tokens of the angle between two hidden states, as a share of pi.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887, angular distance; there of the last token, here of every token.

    Args:
        hidden_in: Hidden states entering the first of the layers, ``(B, T, D)``, any float dtype.
        hidden_out: Hidden states leaving the last of them, ``(B, T, D)``, same dtype.
        mask: True where a token is real, False where it is padding, ``(B, T)``, bool.

    Returns:
        Float64 scalar in ``[0, n]`` for ``n`` real tokens, without autograd history; exactly 0
        where nothing changes.

    Raises:
        ValueError: If the shapes do not fit together, or ``mask`` is not bool.
    """
    if problem := _shape_problem(hidden_in, hidden_out, mask):
        raise ValueError(problem)
    return _masked_sum(_cosines(hidden_in, hidden_out).arccos() / math.pi, mask)


def _cosines(hidden_in: Tensor, hidden_out: Tensor) -> Tensor:
    """Return the cosine of every token, in ``[-1, 1]``, ``(B, T)``, float64."""
    dot = _dot(hidden_in, hidden_out)
    norms = (_dot(hidden_in, hidden_in) * _dot(hidden_out, hidden_out)).sqrt()
    return (dot / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(-1, 1)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    # Products in float32: in bfloat16 the similarity of neighbouring layers rounds to exactly 1.
    # Sums in float64: arccos is steep near 1, and equal states must give exactly 1.
    dtype = torch.promote_types(first.dtype, torch.float32)
    product = first.detach().to(dtype) * second.detach().to(dtype)
    return product.sum(dim=-1, dtype=torch.float64)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    # A choice instead of a product: padding may hold NaN, and NaN * 0 is NaN.
    return torch.where(mask, values, 0.0).sum()


def _shape_problem(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> str | None:
    if hidden_in.shape != hidden_out.shape:
        return (
            f"hidden states must have one shape, got {tuple(hidden_in.shape)} entering the "
            f"layer and {tuple(hidden_out.shape)} leaving it"
        )
    if mask.shape != hidden_in.shape[:-1]:
        return (
            f"mask must have one entry per token, {tuple(hidden_in.shape[:-1])}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        return f"mask must be bool, got {mask.dtype}; convert it with mask.bool()"
    return None
