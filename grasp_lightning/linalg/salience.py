"""How much the loss depends on each weight, to first and second order.

Source: Ma et al., "LLM-Pruner", arXiv:2305.11627.
"""

from torch import Tensor


def first_order(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``|w g|`` for each weight; g is the gradient of the loss."""
    return (weight * gradient).abs()


def second_order(weight: Tensor, squares: Tensor) -> Tensor:
    """Return ``w^2 h`` for each weight.

    h is the mean over texts of the squared gradient of the loss of one text, in place of the
    diagonal of the Hessian matrix.
    """
    return weight.square() * squares


def mixed_order(weight: Tensor, gradient: Tensor, squares: Tensor) -> Tensor:
    """Return ``|w g - w^2 h / 2|`` for each weight, with g and h as above."""
    return (weight * gradient - second_order(weight, squares) / 2).abs()
