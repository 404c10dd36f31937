"""Principal directions of rows, and bases of a subspace.

Legend: D features, d kept directions.
"""

import torch
from torch import Tensor


def principal_directions(
    gram: Tensor, number: int, *, without_mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the directions in which rows X are largest, from their sum ``X^T X``.

    No other subspace of this dimension keeps more of the sum of squares of X.

    Args:
        gram: ``X^T X``, ``(D, D)``, float64.
        number: d, from 1 to D.
        without_mean: The rows have mean 0: the direction of the mean then comes last, also where
            others are as empty.

    Returns:
        Orthonormal columns, ``(D, d)``, by falling eigenvalue, and all D eigenvalues.
    """
    if without_mean:
        size = len(gram)
        # Below all others, which are not negative.
        gram = gram - (gram.diagonal().sum() + 1.0) / size
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1)[:, :number], values.flip(-1).clamp(min=0.0)


def aligned(basis: Tensor, to: Tensor) -> Tensor:
    """Return the basis of the same subspace that is nearest to another basis.

    It makes ``to^T basis`` symmetric, so that the change of basis turns nothing inside the
    directions that both have in common.

    Source: the orthogonal Procrustes problem.

    Args:
        basis: Orthonormal columns, ``(D, d)``.
        to: Orthonormal columns, ``(D, d)``, of the same dtype.
    """
    change: Tensor = basis.mT @ to
    left, _, right = torch.linalg.svd(change)
    turn: Tensor = left @ right
    return basis @ turn
