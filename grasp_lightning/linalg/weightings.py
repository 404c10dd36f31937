"""Metrics in which a weight is truncated, and the decomposition that is optimal in them.

Legend: ``W`` weight ``(N, M)``, with ``N`` outputs and ``M`` inputs; ``A`` output metric ``(N, N)``
with root ``L``, ``A = L L^T``; ``C`` input metric ``(M, M)`` with root ``R``, ``C = R R^T``;
``P diag(s) Q^T`` thin singular value decomposition of ``L^T W R``, with ``K = min(N, M)``
components. Roots are lower triangular; the root of a diagonal metric is the vector of its entries.

A change ``D`` of the weight costs ``tr(A D C D^T) = |L^T D R|^2``. With ``C`` the sum of ``x x^T``
over the inputs of a linear and no ``A``, that is the squared error of its outputs; with ``A`` the
sum of ``g g^T`` over the gradients of the outputs besides, it is a Kronecker-factored estimate of
the curvature of the loss.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning.linalg.factors import SVD, factorize

_MATRIX_NDIM = 2
_ASYMMETRY = 1e-5  # of the largest entry: what float32 sums of two orders may differ by
_FIRST_DAMPING = 1e-10  # tried after a damping of zero has failed
_ATTEMPTS = 7
_FLOOR = 1e-6  # of ASVD, which keeps the scale of an input that is never active from zero

_logger = logging.getLogger(__name__)


class DampedRoot(NamedTuple):
    """Cholesky root of a damped metric, ``root root^T = gram + jitter I``.

    Attributes:
        root: Lower triangular ``(M, M)``, or ``(M,)`` for a diagonal metric, float64.
        jitter: What was added to every entry of the diagonal, in the unit of the metric.
    """

    root: Tensor
    jitter: float


def damped_root(gram: Tensor, damping: float) -> Tensor:
    """Return the lower triangular root of a metric with a little of the identity added.

    ``gram + damping mean(diag(gram)) I = R R^T``. See ``damped_cholesky`` for the details.

    Args:
        gram: Symmetric positive semidefinite matrix ``(M, M)``, or the diagonal of one ``(M,)``.
        damping: Share of the mean of the diagonal that is added to it, not negative.

    Returns:
        ``R``, float64, ``(M, M)`` or ``(M,)`` like ``gram``, without zeros on its diagonal.
    """
    return damped_cholesky(gram, damping).root


def damped_cholesky(gram: Tensor, damping: float) -> DampedRoot:
    """Return the root of a damped metric together with what was added to the metric.

    The metric may have any rank. One of zeros, as of a linear that saw no token, counts as having
    a mean of 1 on its diagonal, so its root is ``sqrt(damping) I``. Where rounding leaves the
    damped metric indefinite, the damping is raised tenfold, up to six times, with a warning.

    Args:
        gram: Symmetric positive semidefinite matrix ``(M, M)``, or the diagonal of one ``(M,)``,
            any float dtype. Of a matrix the lower triangle is read.
        damping: Share of the mean of the diagonal that is added to it, not negative.

    Returns:
        The root in float64, and the absolute amount on the diagonal.

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
                    "damping %g left a metric indefinite, it was raised to %g", damping, tried
                )
            return DampedRoot(root, jitter)
        tried = max(10 * tried, _FIRST_DAMPING)
    raise ValueError(
        f"gram must be positive semidefinite, it is indefinite even with {jitter:g} added to its "
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
    ``s_k^2``. Every set of components, leading or not, has an error of its dropped ``s_k^2``.

    ``U`` and ``V`` are not orthonormal: ``U^T A U = V^T C V = I`` instead.

    Source: with ``left`` None, the whitening of Wang et al., "SVD-LLM", arXiv:2403.07378; with both
    roots, Chekalina et al., "Generalized Fisher-Weighted SVD", arXiv:2505.17974. Triangular systems
    are solved here where the code of the former inverts ``R``.

    Args:
        weight: ``W``, outputs first, ``(N, M)``, any float dtype.
        left: ``L``, lower triangular ``(N, N)``, or ``(N,)`` for a diagonal metric; None for the
            identity.
        right: ``R``, lower triangular ``(M, M)``, or ``(M,)`` for a diagonal metric; None for the
            identity.
        dtype: Of the computation, float64 or float32. Without roots, ``factorize`` chooses.

    Returns:
        Contiguous tensors: float64 if ``weight`` is, float32 otherwise. The singular values are in
        the unit of ``|L^T W R|``. Without roots equal to ``factorize(weight)``. A weight that is no
        finite float matrix, and a root that has not the size of its side, is not lower triangular,
        has zeros on its diagonal or is not finite, is a ``ValueError``.
    """
    if left is None and right is None:
        return factorize(weight)
    if weight.ndim != _MATRIX_NDIM or not weight.is_floating_point():
        return factorize(weight)  # refuses it
    left, right = to_dtype(left, dtype), to_dtype(right, dtype)
    svd = unweight(factorize(_weighted(weight, left, right, dtype)), left, right)
    returned = torch.promote_types(weight.dtype, torch.float32)
    return SVD(*(tensor.to(returned) for tensor in svd))


def weighted_singular_values(weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return the singular values of ``weighted_svd`` alone, which takes about a third of the time.

    Args:
        weight: ``W``, outputs first, ``(N, M)``, finite, any float dtype.
        left: As in ``weighted_svd``.
        right: As in ``weighted_svd``.

    Returns:
        ``(K,)``, descending, float64. A root that does not fit is a ``ValueError``.
    """
    left, right = to_dtype(left, torch.float64), to_dtype(right, torch.float64)
    values: Tensor = torch.linalg.svdvals(_weighted(weight, left, right, torch.float64))
    return values


def _weighted(
    weight: Tensor, left: Tensor | None, right: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``L^T W R``, ``(N, M)``."""
    for name, root, size in zip(("left", "right"), (left, right), weight.shape, strict=True):
        if problem := root_problem(name, root, size):
            raise ValueError(problem)
    weighted = weight.detach().to(dtype)
    if right is not None:
        weighted = weighted * right if right.ndim == 1 else weighted @ right
    return left_weighted(weighted, left)


def left_weighted(weight: Tensor, left: Tensor | None) -> Tensor:
    """Return ``L^T W``.

    Args:
        weight: ``W``, ``(N, M)``.
        left: ``L``, ``(N, N)``, ``(N,)`` or None, in the dtype of ``weight``.

    Returns:
        ``(N, M)``; ``weight`` itself without a root.
    """
    if left is None:
        return weight
    return left[:, None] * weight if left.ndim == 1 else left.mT @ weight


def unweight(svd: SVD, left: Tensor | None, right: Tensor | None) -> SVD:
    """Return the components of ``W`` that belong to those of ``L^T W R``.

    Args:
        svd: ``P``, ``s`` and ``Q^T``.
        left: ``L``, ``(N, N)``, ``(N,)`` or None, in the dtype of ``svd``.
        right: ``R``, ``(M, M)``, ``(M,)`` or None, in the dtype of ``svd``.

    Returns:
        Contiguous ``U = L^-T P``, ``s`` and ``V^T = Q^T R^-1``.
    """
    u, s, vh = svd
    if left is not None:
        is_vector = left.ndim == 1
        u = (
            u / left[:, None]
            if is_vector
            else torch.linalg.solve_triangular(left.mT, u, upper=True)
        )
    if right is not None:
        vh = vh / right if right.ndim == 1 else _solve_right(vh, right)
    return SVD(u.contiguous(), s, vh.contiguous())


def even_norms(svd: SVD) -> SVD:
    """Return the same components with both vectors of each scaled to one norm.

    ``u_k`` and ``v_k`` of a weighted decomposition have norms in the inverse units of the roots,
    which may be many orders apart. ``balanced_factors`` of the result are balanced again.

    Args:
        svd: Components, whose vectors need not be of norm 1.

    Returns:
        Equal ``s`` and equal products ``u_k v_k^T``. A component with a vector of zeros stays as it
        is.
    """
    ratio = (svd.vh.norm(dim=1) / svd.u.norm(dim=0)).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
    return SVD(svd.u * ratio, svd.s, svd.vh / ratio[:, None])


def activation_scales(mean_modulus: Tensor, alpha: float = 0.5) -> Tensor:
    """Return the diagonal root that weights each input by its typical size.

    ``mean(|x_j|)^alpha + 1e-6``.

    Source: Yuan et al., "ASVD", arXiv:2312.05821, with the ``abs_mean`` scaling of its code, which
    sums the means of its batches instead of averaging them: that scales all inputs alike.

    Args:
        mean_modulus: Mean modulus of every input of the linear, not negative, ``(M,)``.
        alpha: Exponent; 0 weights all inputs alike.

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


def root_problem(name: str, root: Tensor | None, size: int) -> str | None:
    """Return why a tensor is no root of a metric.

    Args:
        name: What messages call it.
        root: ``(size, size)``, ``(size,)`` or None.
        size: Rows or columns of the weight on that side.

    Returns:
        None for a root; the text of an error for another shape, a matrix that is not lower
        triangular, zeros on the diagonal, and entries that are not finite.
    """
    if root is None:
        return None
    if tuple(root.shape) not in {(size,), (size, size)}:
        return f"{name} must have shape ({size}, {size}) or ({size},), got {tuple(root.shape)}"
    if not root.isfinite().all():
        return f"{name} has entries that are not finite"
    is_matrix = root.ndim == _MATRIX_NDIM
    if is_matrix and root.triu(1).any():
        return f"{name} must be lower triangular, as damped_root returns it"
    if not (root.diagonal() if is_matrix else root).all():
        return f"{name} has zeros on its diagonal, so it has no inverse; raise the damping"
    return None


def to_dtype(root: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a root in another dtype.

    Args:
        root: Any root, or None.
        dtype: Dtype to convert to.

    Returns:
        The converted root without autograd history, or None.
    """
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
            f"gram must be symmetric, two mirrored entries differ by {asymmetry:g} where the "
            f"largest entry is {largest:g}"
        )


def _root(damped: Tensor) -> Tensor | None:
    if damped.ndim == 1:
        return damped.sqrt() if (damped > 0).all() else None
    root, info = torch.linalg.cholesky_ex(damped)
    return None if info.item() else root


def _solve_right(rows: Tensor, right: Tensor) -> Tensor:
    """Return ``rows R^-1``."""
    solution: Tensor = torch.linalg.solve_triangular(right, rows, upper=False, left=False)
    return solution
