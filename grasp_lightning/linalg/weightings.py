"""Metrics in which a weight is truncated, and the decomposition that is optimal in them.

Legend: ``W`` weight ``(N, M)``, with ``N`` outputs and ``M`` inputs; ``A`` output metric ``(N, N)``
with root ``L``, ``A = L L^T``; ``C`` input metric ``(M, M)`` with root ``R``, ``C = R R^T``;
``P diag(s) Q^T`` thin singular value decomposition of ``L^T W R``, with ``K = min(N, M)``
components. Roots are lower triangular; the root of a diagonal metric is the vector of its entries.
Where a root is a parameter, ``left`` is ``L``, ``(N, N)`` or ``(N,)``, ``right`` is ``R``,
``(M, M)`` or ``(M,)``, and None is the identity.

A change ``D`` of the weight costs ``tr(A D C D^T) = |L^T D R|^2``. With ``C`` the sum of ``x x^T``
over the inputs of a linear and no ``A``, that is the squared error of its outputs; with ``A`` also
the sum of ``g g^T`` over the gradients of the outputs, it is a Kronecker-factored estimate of the
curvature of the loss.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning.linalg.factors import SVD, factorize
from grasp_lightning.linalg.precision import full_precision

_MATRIX_NDIM = 2
_ASYMMETRY = 1e-5  # relative to the largest entry: float32 sums depend on their order
_FIRST_DAMPING = 1e-10  # if a damping of zero fails
_ATTEMPTS = 7
_FLOOR = 1e-6  # of ASVD: an input that is never active has a scale above zero

_logger = logging.getLogger(__name__)


class DampedRoot(NamedTuple):
    """Cholesky root of a damped metric, ``root root^T = gram + jitter I``.

    Attributes:
        root: Lower triangular ``(M, M)``, or ``(M,)`` for a diagonal metric, float64.
        jitter: The amount added to every diagonal entry, in the unit of the metric.
    """

    root: Tensor
    jitter: float


def damped_root(gram: Tensor, damping: float) -> Tensor:
    """Return the root of ``damped_cholesky`` alone, without zeros on its diagonal."""
    return damped_cholesky(gram, damping).root


def damped_cholesky(gram: Tensor, damping: float) -> DampedRoot:
    """Return ``R`` with ``R R^T = gram + damping mean(diag(gram)) I``, and the added amount.

    The metric may have any rank. A metric of zeros, as of a linear that saw no token, counts as
    having a mean diagonal of 1, so its root is ``sqrt(damping) I``. If the damped metric is
    indefinite because of rounding, the damping is raised tenfold, up to six times, with a warning.

    Args:
        gram: Symmetric positive semidefinite matrix ``(M, M)``, or the diagonal of one ``(M,)``,
            any float dtype. Of a matrix the lower triangle is read.
        damping: Share of the mean diagonal that is added to the diagonal, not negative.

    Raises:
        ValueError: If ``gram`` is not square, finite and symmetric, is indefinite, or ``damping``
            is negative or not finite.
    """
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and not negative, got {damping}")
    _check_gram(gram)
    damped = gram.detach().to(torch.float64, copy=True)
    is_matrix = damped.ndim == _MATRIX_NDIM
    diagonal = damped.diagonal() if is_matrix else damped
    mean = float(diagonal.mean())
    if mean == 0:
        mean = 1.0
    jitter, tried = 0.0, damping
    for _ in range(_ATTEMPTS):
        diagonal += tried * mean - jitter
        jitter = tried * mean
        root = _root(damped)
        if root is not None:
            if tried != damping:
                _logger.warning(
                    "damping %g left a metric indefinite; it was raised to %g", damping, tried
                )
            return DampedRoot(root, jitter)
        tried = max(10 * tried, _FIRST_DAMPING)
    raise ValueError(
        f"gram must be positive semidefinite; it is indefinite even with {jitter:g} added to its "
        f"diagonal, whose mean is {mean:g}"
    )


def weighted_svd(
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
) -> SVD:
    """Return the decomposition whose truncations are optimal in a weighted norm.

    From ``L^T W R = P diag(s) Q^T`` follows ``W = sum_k s_k u_k v_k^T`` with ``U = L^-T P`` and
    ``V^T = Q^T R^-1``. By Eckart and Young, the ``r`` leading components minimise
    ``|L^T (W - W') R|^2`` over all ``W'`` of rank ``r``, and the minimum is the sum of the dropped
    ``s_k^2``. Every set of components, leading or not, has the error of its dropped ``s_k^2``.

    ``U`` and ``V`` are not orthonormal: ``U^T A U = V^T C V = I`` instead.

    Source: with ``left`` None, the whitening of Wang et al., "SVD-LLM", arXiv:2403.07378; with both
    roots, Chekalina et al., "Generalized Fisher-Weighted SVD", arXiv:2505.17974. Triangular systems
    are solved here where the code of the former inverts ``R``.

    Args:
        weight: ``W``, outputs first, ``(N, M)``, any float dtype.
        dtype: Dtype of the computation, float64 or float32. Without roots, ``factorize`` chooses.

    Returns:
        Contiguous tensors: float64 if ``weight`` is, float32 otherwise. The singular values are in
        the unit of ``|L^T W R|``. Without roots it equals ``factorize(weight)``. A weight that is
        not a finite float matrix, and an invalid root (see ``check_root``), are a ``ValueError``.
    """
    if left is None and right is None:
        return factorize(weight)
    if weight.ndim != _MATRIX_NDIM or not weight.is_floating_point():
        return factorize(weight)  # refuses it
    left, right = to_dtype(left, dtype), to_dtype(right, dtype)
    with full_precision(weight.device):
        svd = _unweight(factorize(_weighted(weight, left, right, dtype)), left, right)
    returned = torch.promote_types(weight.dtype, torch.float32)
    return SVD(*(tensor.to(returned) for tensor in svd))


def weighted_singular_values(weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return the singular values of ``weighted_svd``, ``(K,)``, float64, in a third of the time."""
    left, right = to_dtype(left, torch.float64), to_dtype(right, torch.float64)
    values: Tensor = torch.linalg.svdvals(_weighted(weight, left, right, torch.float64))
    return values


def _weighted(
    weight: Tensor, left: Tensor | None, right: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``L^T W R``, ``(N, M)``."""
    for name, root, size in zip(("left", "right"), (left, right), weight.shape, strict=True):
        check_root(name, root, size)
    weighted = weight.detach().to(dtype)
    if right is not None:
        weighted = weighted * right if right.ndim == 1 else weighted @ right
    return left_weighted(weighted, left)


def left_weighted(weight: Tensor, left: Tensor | None) -> Tensor:
    """Return ``L^T W``, ``(N, M)``, in the dtype of both."""
    if left is None:
        return weight
    return left[:, None] * weight if left.ndim == 1 else left.mT @ weight


def _unweight(svd: SVD, left: Tensor | None, right: Tensor | None) -> SVD:
    """Return the components of ``W`` from those of ``L^T W R``: ``L^-T P``, ``s``, ``Q^T R^-1``."""
    u, s, vh = svd
    solve = torch.linalg.solve_triangular
    if left is not None:
        u = u / left[:, None] if left.ndim == 1 else solve(left.mT, u, upper=True)
    if right is not None:
        vh = vh / right if right.ndim == 1 else solve(right, vh, upper=False, left=False)
    return SVD(u.contiguous(), s, vh.contiguous())


def even_norms(svd: SVD) -> SVD:
    """Return equal components with both vectors of each scaled to one norm.

    ``u_k`` and ``v_k`` of a weighted decomposition have norms in the inverse units of the roots,
    which may be many orders apart. Afterwards ``balanced_factors`` gives balanced factors again.
    ``s`` and the products ``u_k v_k^T`` stay equal, and so do components with a vector of zeros.
    """
    ratio = (svd.vh.norm(dim=1) / svd.u.norm(dim=0)).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
    return SVD(svd.u * ratio, svd.s, svd.vh / ratio[:, None])


def activation_scales(mean_modulus: Tensor, alpha: float = 0.5) -> Tensor:
    """Return the diagonal root that weights each input by its typical size.

    ``mean(|x_j|)^alpha + 1e-6``.

    Source: Yuan et al., "ASVD", arXiv:2312.05821, with the ``abs_mean`` scaling of its code, which
    sums the means of its batches instead of averaging them: that scales all inputs equally.

    Args:
        mean_modulus: Mean modulus of every input of the linear, not negative, ``(M,)``.
        alpha: Exponent; 0 weights all inputs equally.

    Returns:
        ``right`` root for ``weighted_svd``, ``(M,)``, float64, positive.

    Raises:
        ValueError: If ``mean_modulus`` is no vector, or has negative or non-finite entries.
    """
    values = mean_modulus.detach().double()
    if values.ndim != 1 or not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(
            f"mean_modulus must be a vector of finite numbers that are not negative, "
            f"got shape {tuple(values.shape)}"
        )
    return values**alpha + _FLOOR


def check_root(name: str, root: Tensor | None, size: int) -> None:
    """Refuse a root that is not of this size, finite, lower triangular and invertible."""
    if root is None:
        return
    if tuple(root.shape) not in {(size,), (size, size)}:
        expected = f"({size}, {size}) or ({size},)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(root.shape)}")
    if not root.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")
    is_matrix = root.ndim == _MATRIX_NDIM
    if is_matrix and root.triu(1).any():
        raise ValueError(f"{name} must be lower triangular, as damped_root returns it")
    if not (root.diagonal() if is_matrix else root).all():
        raise ValueError(
            f"{name} has zeros on its diagonal, so it has no inverse; raise the damping"
        )


def to_dtype(root: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a root in another dtype, without autograd history."""
    return None if root is None else root.detach().to(dtype)


def _check_gram(gram: Tensor) -> None:
    is_square = gram.ndim == _MATRIX_NDIM and gram.shape[0] == gram.shape[1]
    if gram.numel() == 0 or not (gram.ndim == 1 or is_square):
        raise ValueError(
            f"gram must be a square matrix or a vector with at least one entry, "
            f"got shape {tuple(gram.shape)}"
        )
    if not gram.is_floating_point():
        raise ValueError(f"gram must have a float dtype, got {gram.dtype}")
    if not gram.isfinite().all():
        bad = int((~gram.isfinite()).sum())
        raise ValueError(f"gram has {bad} non-finite entries of {gram.numel()}")
    if gram.ndim == 1:
        return
    largest = float(gram.abs().max())
    asymmetry = float((gram - gram.mT).abs().max())
    if asymmetry > _ASYMMETRY * largest:
        raise ValueError(
            f"gram must be symmetric; two mirrored entries differ by {asymmetry:g} where the "
            f"largest entry is {largest:g}"
        )


def _root(damped: Tensor) -> Tensor | None:
    if damped.ndim == 1:
        return damped.sqrt() if (damped > 0).all() else None
    root, info = torch.linalg.cholesky_ex(damped)
    return None if info.item() else root
