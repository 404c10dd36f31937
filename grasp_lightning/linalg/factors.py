"""Singular value decomposition of a weight, and the two factors that replace it.

Legend: ``W`` weight ``(N, M)``, with ``N`` outputs and ``M`` inputs; ``K = min(N, M)`` singular
components ``(u_k, s_k, v_k)`` with ``W = sum_k s_k u_k v_k^T``; ``r`` kept components.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning.linalg.precision import full_precision

_MATRIX_NDIM = 2


class SVD(NamedTuple):
    """Thin singular value decomposition ``W = u diag(s) vh``, float32 or float64.

    Attributes:
        u: Left singular vectors in columns, ``(N, K)``.
        s: Singular values, descending, not negative, ``(K,)``.
        vh: Right singular vectors in rows, ``(K, M)``.
    """

    u: Tensor
    s: Tensor
    vh: Tensor


class Factors(NamedTuple):
    """Two matrices, ``(N, r)`` and ``(r, M)``, whose product ``left @ right`` replaces a weight."""

    left: Tensor
    right: Tensor


def factorize(weight: Tensor) -> SVD:
    """Return the thin singular value decomposition of a weight.

    Args:
        weight: Matrix of a linear, outputs first, ``(N, M)``, any float dtype.

    Returns:
        Contiguous tensors without autograd history on the device of ``weight``: float64 if
        ``weight`` is, float32 otherwise. The sign of a pair ``(u_k, v_k)`` is arbitrary.

    Raises:
        ValueError: If ``weight`` is not a finite, non-empty float matrix.
    """
    if weight.ndim != _MATRIX_NDIM or weight.numel() == 0:
        raise ValueError(
            f"weight must be a matrix with at least one row and one column, "
            f"got shape {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must have a float dtype, got {weight.dtype}; dequantise it first")
    _check_finite(weight)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with full_precision(weight.device):
        u, s, vh = torch.linalg.svd(weight.detach().to(dtype), full_matrices=False)
    # LAPACK returns column-major u and vh; collectives and safetensors want contiguous tensors.
    return SVD(u.contiguous(), s.contiguous(), vh.contiguous())


def balanced_factors(svd: SVD, components: Sequence[int]) -> Factors:
    """Return factors of the chosen singular components, with each singular value split evenly.

    ``left = U_c sqrt(s_c)`` and ``right = sqrt(s_c) V_c^T``: the columns of one and the rows of the
    other have equal norms, which suits low-precision copies and further training.

    Args:
        svd: Decomposition with ``K`` components.
        components: Indices of the ``r`` kept components, ascending, each in ``[0, K)``.

    Returns:
        Contiguous factors in the dtype of ``svd``, sharing no memory with it.
    """
    _check_components(components, svd.s.numel())
    index = torch.tensor(components, device=svd.s.device)
    root = svd.s[index].sqrt()
    left = svd.u[:, index] * root  # (N, r)
    right = root[:, None] * svd.vh[index]  # (r, M)
    return Factors(left.contiguous(), right.contiguous())


def _check_finite(weight: Tensor) -> None:
    is_finite = weight.isfinite()
    if is_finite.all():
        return
    bad = (~is_finite).nonzero()
    row, column = bad[0].tolist()
    raise ValueError(
        f"weight has {len(bad)} non-finite entries of {weight.numel()}, the first is "
        f"{weight[row, column].item()} at row {row}, column {column}"
    )


def _check_components(components: Sequence[int], num_components: int) -> None:
    if len(components) == 0:
        raise ValueError("components must name at least one singular component, got none")
    for component in components:
        if not 0 <= component < num_components:
            raise ValueError(
                f"components must lie in [0, {num_components}), as the weight has "
                f"{num_components} singular components, got {component}"
            )
    for lower, upper in pairwise(components):
        if lower >= upper:
            raise ValueError(
                f"components must be strictly ascending, got {lower} before {upper}; "
                f"sort them and remove duplicates"
            )
