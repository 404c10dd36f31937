"""Weights that map given inputs to given outputs, by least squares.

Legend: ``X`` inputs ``(M, T)`` and ``Y`` target outputs ``(N, T)`` of ``T`` tokens in columns,
known only by their sums ``cross = Y X^T`` ``(N, M)`` and ``gram = X X^T`` ``(M, M)``; ``W'`` the
fitted weight ``(N, M)``. With inputs of a compressed model and outputs of the dense one, the fit
also compensates for losses before this linear.
"""

import torch
from torch import Tensor

from grasp_lightning.linalg.weightings import damped_cholesky


def pulled_regression(
    cross: Tensor, gram: Tensor, prior: Tensor, *, pull: float, ridge: float
) -> Tensor:
    """Return the weight that best maps inputs to outputs, pulled towards a prior weight.

    It minimises ``|Y - W' X|^2 + pull |(W' - prior) X|^2 + rho |W' - prior|^2`` with ``rho`` the
    ridge times the mean diagonal of ``gram``. A pull of 1 goes halfway from the prior to the
    least-squares solution in all directions; the ridge keeps the prior in directions where the
    inputs are small.

    Args:
        cross: ``Y X^T``, summed over tokens, ``(N, M)``, any float dtype.
        gram: ``X X^T``, summed over the same tokens, ``(M, M)``.
        prior: ``(N, M)``.
        pull: Cost of a squared difference of outputs from those of the prior, not negative.
        ridge: Share of the mean diagonal of ``gram``, not negative.

    Returns:
        ``W'``, ``(N, M)``, float64 if ``prior`` is, float32 otherwise.

    Raises:
        ValueError: If the shapes do not fit, or ``gram`` is not symmetric positive semidefinite.
    """
    if cross.ndim != 2 or tuple(gram.shape) != 2 * (cross.shape[1],):  # noqa: PLR2004
        raise ValueError(
            f"cross must be (outputs, inputs) and gram (inputs, inputs), got {tuple(cross.shape)} "
            f"and {tuple(gram.shape)}"
        )
    if prior.shape != cross.shape:
        raise ValueError(
            f"prior must have the shape of cross, {tuple(cross.shape)}, got {tuple(prior.shape)}"
        )
    start, sums = prior.detach().double(), gram.detach().double()
    root = damped_cholesky(sums, ridge / (1 + pull)).root
    # Fit the change of the prior: pull and ridge cost nothing at a change of 0.
    rest = (cross.detach().double() - start @ sums) / (1 + pull)
    change = torch.cholesky_solve(rest.mT, root).mT
    return (start + change).to(torch.promote_types(prior.dtype, torch.float32)).contiguous()
