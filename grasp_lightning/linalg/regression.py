"""Low-rank weights that map given inputs to given outputs, by least squares.

Legend: ``X`` inputs ``(M, T)`` and ``Y`` wanted outputs ``(N, T)`` of ``T`` tokens in columns,
known by their sums alone: ``cross = Y X^T`` ``(N, M)``, ``gram = X X^T`` ``(M, M)`` and ``|Y|^2``;
``W'`` the fitted weight ``(N, M)``. Where the inputs are those of a compressed model, and the
outputs those of the dense one, the fit also makes good what was lost before this linear.
"""

import torch
from torch import Tensor

from grasp_lightning.linalg.factors import SVD, factorize
from grasp_lightning.linalg.weightings import (
    damped_cholesky,
    left_weighted,
    root_problem,
    to_dtype,
    unweight,
)


def reduced_rank_regression(
    cross: Tensor,
    gram: Tensor,
    rank: int,
    *,
    prior: Tensor | None = None,
    ridge: float = 0.0,
    left: Tensor | None = None,
) -> SVD:
    """Return the weight of a rank that maps inputs to outputs with the least squared error.

    It minimises ``|L^T (Y - W' X)|^2 + rho |L^T (W' - prior)|^2`` over all ``W'`` of the rank, with
    ``rho = ridge mean(diag(gram))``. With ``gram + rho I = R R^T`` and ``B = cross + rho prior``,
    that is ``|L^T (B R^-T - W' R)|^2`` up to a constant, so the best ``L^T W' R`` is the truncated
    decomposition ``P diag(s) Q^T`` of ``L^T B R^-T``.

    Where ``cross = W gram`` and ``prior = W``, so that the outputs are those of a weight ``W``, the
    result is the truncation of ``weighted_svd`` of that weight.

    Source: Izenman, "Reduced-rank regression for the multivariate linear model", Journal of
    Multivariate Analysis 5 (1975); the ridge and its prior are added to the sums.

    Args:
        cross: ``Y X^T``, summed over tokens, ``(N, M)``, any float dtype.
        gram: ``X X^T``, summed over the same tokens, ``(M, M)``.
        rank: Rank of the result, in ``[1, min(N, M)]``.
        prior: Weight that the ridge pulls to, ``(N, M)``, such as the dense one; None for zeros.
        ridge: Strength of the pull as a share of the mean of the diagonal of ``gram``. Raised, with
            a warning, where the sum with ``gram`` is not positive definite.
        left: ``L``, root of the metric of the outputs, lower triangular ``(N, N)`` or ``(N,)`` for
            a diagonal one; None for the identity.

    Returns:
        ``rank`` components, float64 if ``cross`` is, float32 otherwise. ``u`` and ``vh`` are not
        orthonormal, as those of ``weighted_svd``.

    Raises:
        ValueError: If the shapes do not fit, ``rank`` is out of range, ``gram`` is not symmetric
            positive semidefinite, or ``left`` is no root.
    """
    if problem := _sums_problem(cross, gram) or root_problem("left", left, cross.shape[0]):
        raise ValueError(problem)
    if prior is not None and prior.shape != cross.shape:
        raise ValueError(
            f"prior must have the shape of cross, {tuple(cross.shape)}, got {tuple(prior.shape)}"
        )
    if not 1 <= rank <= min(cross.shape):
        raise ValueError(f"rank must lie in [1, {min(cross.shape)}], got {rank}")
    root, rho = damped_cholesky(gram, ridge)
    target = cross.detach().double()
    if prior is not None:
        target = target + rho * prior.detach().double()
    left = to_dtype(left, torch.float64)
    # R^-T from the right is the transpose of R^-1 from the left.
    whitened = torch.linalg.solve_triangular(root, target.mT, upper=False).mT
    u, s, vh = factorize(left_weighted(whitened, left))
    svd = unweight(SVD(u[:, :rank], s[:rank], vh[:rank]), left, root)
    returned = torch.promote_types(cross.dtype, torch.float32)
    return SVD(*(tensor.to(returned) for tensor in svd))


def pulled_regression(
    cross: Tensor, gram: Tensor, prior: Tensor, *, pull: float, ridge: float
) -> Tensor:
    """Return the weight that maps inputs to outputs best, pulled to one that is there already.

    It minimises ``|Y - W' X|^2 + pull |(W' - prior) X|^2 + rho |W' - prior|^2`` with ``rho`` the
    ridge times the mean of the diagonal of ``gram``. A pull of 1 goes half the way from the prior
    to the least-squares solution, in all directions; the ridge keeps the prior in those that the
    inputs hardly have.

    Args:
        cross: ``Y X^T``, summed over tokens, ``(N, M)``, any float dtype.
        gram: ``X X^T``, summed over the same tokens, ``(M, M)``.
        prior: Weight that is pulled to, ``(N, M)``.
        pull: Cost of a squared difference of outputs from those of the prior, not negative.
        ridge: Share of the mean of the diagonal of ``gram``, not negative.

    Returns:
        ``W'``, ``(N, M)``, float64 if ``prior`` is, float32 otherwise.

    Raises:
        ValueError: If the shapes do not fit, or ``gram`` is not symmetric positive semidefinite.
    """
    if problem := _sums_problem(cross, gram):
        raise ValueError(problem)
    if prior.shape != cross.shape:
        raise ValueError(
            f"prior must have the shape of cross, {tuple(cross.shape)}, got {tuple(prior.shape)}"
        )
    start, sums = prior.detach().double(), gram.detach().double()
    root = damped_cholesky(sums, ridge / (1 + pull)).root
    # What is left to explain after the prior: the pull and the ridge cost nothing at a change of 0.
    rest = (cross.detach().double() - start @ sums) / (1 + pull)
    change = torch.cholesky_solve(rest.mT, root).mT
    return (start + change).to(torch.promote_types(prior.dtype, torch.float32)).contiguous()


def output_error(weight: Tensor, cross: Tensor, gram: Tensor, y_square: float) -> Tensor:
    """Return the squared error of a weight's outputs, from sums over tokens.

    ``|Y - W X|^2 = |Y|^2 - 2 <W, cross> + <W gram, W>``.

    Args:
        weight: ``W``, ``(N, M)``, any float dtype.
        cross: ``Y X^T``, ``(N, M)``.
        gram: ``X X^T``, ``(M, M)``.
        y_square: ``|Y|^2``, sum of the squares of all outputs of all tokens.

    Returns:
        Float64 scalar, summed over outputs and tokens. Exact to about 1e-16 of ``y_square`` if the
        sums are: small errors are differences of large numbers, and may come out negative.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if problem := _sums_problem(cross, gram):
        raise ValueError(problem)
    if weight.shape != cross.shape:
        raise ValueError(
            f"weight must have the shape of cross, {tuple(cross.shape)}, got {tuple(weight.shape)}"
        )
    weight = weight.detach().double()
    # <W, W gram - 2 cross> in one product of this size.
    return y_square + (weight * (weight @ gram.double() - 2 * cross.double())).sum()


def _sums_problem(cross: Tensor, gram: Tensor) -> str | None:
    num_inputs = cross.shape[-1] if cross.ndim > 0 else 0
    if cross.ndim == gram.ndim and tuple(gram.shape) == (num_inputs, num_inputs):
        return None
    return (
        f"cross must be (outputs, inputs) and gram (inputs, inputs), got {tuple(cross.shape)} and "
        f"{tuple(gram.shape)}"
    )
