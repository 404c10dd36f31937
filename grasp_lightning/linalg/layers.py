"""How far decoder layers turn hidden states: sums over tokens.

Legend: ``B`` windows, ``T`` tokens per window, ``D`` hidden size; ``hidden_in`` and ``hidden_out``
``(B, T, D)``, states that enter and leave the layers, of one float dtype; ``mask`` ``(B, T)``,
bool, True for the ``n`` real tokens. Other shapes are a ``ValueError``. The sums are float64
scalars without autograd history: they are added over batches and processes, and divided once by
the number of tokens.
"""

import math

import torch
from torch import Tensor


def cosine_sum(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over tokens of the cosine between two hidden states.

    It is in ``[-n, n]``, and exactly ``n`` if nothing changes. A zero vector counts as orthogonal
    to all others.
    """
    return _masked_sum(_cosines(hidden_in, hidden_out, mask), mask)


def angular_distance_sum(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over tokens of the angle between two hidden states, as a share of pi.

    It is in ``[0, n]``, and exactly 0 if nothing changes.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887, angular distance, which uses the last token there and every token here.
    """
    return _masked_sum(_cosines(hidden_in, hidden_out, mask).arccos() / math.pi, mask)


def _cosines(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> Tensor:
    """Return the cosine of every token, in ``[-1, 1]``, ``(B, T)``, float64."""
    _check_shapes(hidden_in, hidden_out, mask)
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
    # Not a product: padding may hold NaN, and NaN * 0 is NaN.
    return torch.where(mask, values, 0.0).sum()


def _check_shapes(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> None:
    if hidden_in.shape != hidden_out.shape:
        raise ValueError(
            f"hidden states must have one shape, got {tuple(hidden_in.shape)} entering the "
            f"layer and {tuple(hidden_out.shape)} leaving it"
        )
    if mask.shape != hidden_in.shape[:-1]:
        raise ValueError(
            f"mask must have one entry per token, {tuple(hidden_in.shape[:-1])}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}; convert it with mask.bool()")
