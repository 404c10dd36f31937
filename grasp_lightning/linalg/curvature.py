"""Sums over tokens that make up the metrics of ``weightings``.

Legend: ``T`` tokens; ``x`` inputs of a linear ``(T, M)``; ``g`` gradients of the loss by its
outputs ``(T, N)``, so that a token adds ``g_t x_t^T`` to the gradient of the weight.
"""

import torch
from torch import Tensor

_CHUNK = 256  # tokens that are summed in float32, where 1024 came to 1e-6
_MATRIX_NDIM = 2


def gram_sum(
    x: Tensor, weights: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the weighted sum of ``x_t x_t^T`` over tokens.

    Products are taken in the dtype of ``x``, but at least in float32, over 256 tokens at a time,
    and these sums are added up in ``dtype``. In float32 that comes within 1e-6 of the norm of the
    float64 sum, however the tokens are split into calls, at the speed of float32.

    Args:
        x: One row per token, ``(T, M)``, any float dtype; padding left out.
        weights: Weight of every token, not negative, ``(T,)``; None weights each by 1.
        dtype: Of the sum, float64 or float32.

    Returns:
        ``(M, M)``, symmetric up to rounding; zeros for no token. Add the results of all batches.

    Raises:
        ValueError: If ``x`` is no matrix, or ``weights`` has not one entry per token or has
            negative ones.
    """
    if problem := _tokens_problem(x, weights):
        raise ValueError(problem)
    rows = _float32_or_better(x)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            if weights is not None:
                # A root on both sides keeps the product symmetric and semidefinite.
                root = weights[start : start + _CHUNK].detach().to(chunk.dtype).sqrt()
                chunk = chunk * root[:, None]
            total += chunk.mT @ chunk
    return total


def square_sum(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the weighted sum of the squares of every column, the diagonal of ``gram_sum``.

    Args:
        x: One row per token, ``(T, M)``, any float dtype; padding left out.
        weights: Weight of every token, not negative, ``(T,)``; None weights each by 1.

    Returns:
        ``(M,)``, float64.

    Raises:
        ValueError: If ``x`` is no matrix, or ``weights`` has not one entry per token or has
            negative ones.
    """
    if problem := _tokens_problem(x, weights):
        raise ValueError(problem)
    squares = _float32_or_better(x).square()
    if weights is not None:
        squares *= weights.detach().to(squares.dtype)[:, None]
    return squares.sum(dim=0, dtype=torch.float64)


def squared_gradient_sum(x: Tensor, grad_output: Tensor) -> Tensor:
    """Return the sum over tokens of the squared gradients of every entry of the weight.

    ``sum_t (g_ti x_tj)^2``: the diagonal of the empirical Fisher information where every token
    counts as a sample of its own, without the products of different tokens that the square of a
    gradient of a whole window contains.

    Args:
        x: Inputs of the linear, ``(T, M)``, any float dtype.
        grad_output: Gradient of the loss by its outputs, ``(T, N)``, any float dtype.

    Returns:
        ``(N, M)``, float64, for ``fisher_scales``.

    Raises:
        ValueError: If the two do not have one row per token each.
    """
    if not x.ndim == grad_output.ndim == _MATRIX_NDIM or len(x) != len(grad_output):
        raise ValueError(
            f"x and grad_output must have one row per token, got {tuple(x.shape)} and "
            f"{tuple(grad_output.shape)}"
        )
    with torch.autocast(x.device.type, enabled=False):
        # Squared gradients of a mean loss underflow float32.
        return grad_output.detach().double().square().mT @ x.detach().double().square()


def _float32_or_better(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _tokens_problem(x: Tensor, weights: Tensor | None) -> str | None:
    if x.ndim != _MATRIX_NDIM:
        return f"x must have one row per token, (T, M), got shape {tuple(x.shape)}"
    if weights is None:
        return None
    if tuple(weights.shape) != (len(x),):
        return f"weights must have one entry per token, ({len(x)},), got {tuple(weights.shape)}"
    if (weights < 0).any():
        return f"weights must not be negative, got {float(weights.min())}"
    return None
