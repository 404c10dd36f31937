"""Attribution of the loss to singular components, from the gradient of the dense weight.

Legend: ``W = U diag(s) V^T`` weight ``(N, M)`` with ``K`` singular components ``(u_k, s_k, v_k)``;
``L`` loss; ``G = dL/dW``, ``(N, M)``; ``P = G V``, ``(N, K)``; ``Q = G^T U``, ``(M, K)``.

For parameters ``u``, ``s``, ``v`` of a layer with weight ``U diag(s) V^T`` the chain rule gives
``dL/ds_k = u_k^T G v_k``, ``dL/dU = P diag(s)`` and ``dL/dV = Q diag(s)``, so the model never has
to run in factored form. Flipping the sign of a pair ``(u_k, v_k)`` changes no score.

``G = Y^T X`` sums over ``T`` tokens, ``X`` ``(T, M)`` the inputs of the linear and ``Y`` ``(T, N)``
the gradients of its outputs. With ``A = X V`` and ``B = Y U``, both ``(T, K)``, the same numbers
are ``dL/ds_k = sum_t A_tk B_tk``, ``P = Y^T A`` and ``Q = X^T B``: for few tokens this takes fewer
operations than forming ``G``.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from grasp_lightning.linalg.factors import SVD
from grasp_lightning.linalg.precision import full_precision

ScoredTerms = Literal["full", "sigma"]
GradientScore = Literal["taylor", "gradient"]


class TokenGradient(NamedTuple):
    """Gradient of a weight as a sum over tokens, ``G = grad_output^T x``.

    Attributes:
        x: Inputs of the linear, ``(T, M)``, any float dtype.
        grad_output: Gradient of the loss by its outputs, ``(T, N)``, any float dtype.
    """

    x: Tensor
    grad_output: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the gradient as a matrix ``G``, ``(N, M)``, computed in a dtype."""
        with full_precision(self.x.device):
            return self.grad_output.detach().to(dtype).mT @ self.x.detach().to(dtype)


def sigma_gradients(svd: SVD, weight_grad: Tensor | TokenGradient) -> Tensor:
    """Return the signed gradients of the singular values alone, ``u_k^T G v_k``.

    Args:
        svd: Decomposition of the weight.
        weight_grad: As in ``window_scores``.

    Returns:
        ``dL/ds``, ``(K,)``, in the wider dtype of both, float32 or better.
    """
    return _projections(svd, weight_grad, terms="sigma").s_grad


def window_scores(
    svd: SVD,
    weight_grad: Tensor | TokenGradient,
    *,
    terms: ScoredTerms,
    score: GradientScore,
    squared: bool,
) -> Tensor:
    """Score every singular component by the gradient of one calibration window.

    With ``theta`` running over the parameters of component k, ``terms="full"`` returns
    ``|s_k dL/ds_k| + sum_i |u_ik dL/du_ik| + sum_j |v_jk dL/dv_jk|``, the first-order loss change,
    and ``terms="sigma"`` its first term alone.

    Absolute values do not commute with sums over windows: sum these scores over windows for the
    reductions ``absolute`` and ``squared``, and pass the gradient summed over windows for
    ``signed``.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6.

    Args:
        svd: Decomposition of the weight.
        weight_grad: ``G``, the loss gradient of the dense weight over one window (or the sum over
            windows), ``(N, M)``, any float dtype, or its tokens.
        terms: ``full`` scores u, s and v of a component, ``sigma`` its singular value alone.
        score: ``taylor`` takes ``theta dL/dtheta`` of each parameter, ``gradient`` ``dL/dtheta``.
        squared: Square every term instead of taking its absolute value.

    Returns:
        Scores, not negative, ``(K,)``, float32 or better: in the unit of the loss for ``taylor``
        without ``squared``. NaN and infinity in ``weight_grad`` propagate.

    Raises:
        ValueError: If ``terms`` or ``score`` is unknown.
    """
    # Without a check, an unknown word would silently give another score.
    if terms not in get_args(ScoredTerms):
        raise ValueError(f"terms must be one of {get_args(ScoredTerms)}, got {terms!r}")
    if score not in get_args(GradientScore):
        raise ValueError(f"score must be one of {get_args(GradientScore)}, got {score!r}")
    svd, s_grad, left, right = _projections(svd, weight_grad, terms)
    is_taylor = score == "taylor"
    scores = _modulus(svd.s * s_grad if is_taylor else s_grad, squared)
    if left is None or right is None:
        return scores
    u_sum = _modulus(svd.u * left if is_taylor else left, squared).sum(dim=0)
    v_sum = _modulus(svd.vh * right if is_taylor else right, squared).sum(dim=1)
    # dL/dU and dL/dV carry s_k as a common factor of the component, applied once to the sums.
    return scores + _modulus(svd.s, squared) * (u_sum + v_sum)


def _check_shape(svd: SVD, weight_grad: Tensor | TokenGradient) -> None:
    rows, columns = svd.u.shape[0], svd.vh.shape[1]
    if isinstance(weight_grad, TokenGradient):
        x, grad_output = (tuple(tensor.shape) for tensor in weight_grad)
        num_tokens = x[0] if x else 0
        if (grad_output, x) != ((num_tokens, rows), (num_tokens, columns)):
            raise ValueError(
                f"x and grad_output must be (tokens, {columns}) and (tokens, {rows}), as the "
                f"weight is {(rows, columns)}, got {x} and {grad_output}"
            )
    elif tuple(weight_grad.shape) != (rows, columns):
        raise ValueError(
            f"weight_grad must have the shape of the weight, {(rows, columns)}, got "
            f"{tuple(weight_grad.shape)}"
        )


class _Projections(NamedTuple):
    """A decomposition and a gradient on it, in one dtype.

    Attributes:
        s_grad: ``dL/ds``, ``(K,)``.
        left: ``P``, ``(N, K)``; None if only the singular values are scored.
        right: ``Q^T``, ``(K, M)``, laid out like ``vh``; None if ``left`` is.
    """

    svd: SVD
    s_grad: Tensor
    left: Tensor | None = None
    right: Tensor | None = None


def _projections(svd: SVD, weight_grad: Tensor | TokenGradient, terms: ScoredTerms) -> _Projections:
    _check_shape(svd, weight_grad)
    parts = weight_grad if isinstance(weight_grad, TokenGradient) else (weight_grad,)
    dtype = torch.float32
    for part in (svd.s, *parts):
        dtype = torch.promote_types(dtype, part.dtype)
    is_sigma = terms == "sigma"
    if isinstance(weight_grad, TokenGradient) and not _is_cheaper(weight_grad, svd, terms):
        weight_grad = weight_grad.dense(dtype)
    svd = SVD(*(part.detach().to(dtype) for part in svd))
    with full_precision(svd.s.device):
        if isinstance(weight_grad, TokenGradient):
            x, grad_output = (part.detach().to(dtype) for part in weight_grad)
            a, b = x @ svd.vh.mT, grad_output @ svd.u
            s_grad = (a * b).sum(dim=0)
            sides = () if is_sigma else (grad_output.mT @ a, b.mT @ x)
        else:
            grad = weight_grad.detach().to(dtype)
            left = grad @ svd.vh.mT
            s_grad = (svd.u * left).sum(dim=0)
            sides = () if is_sigma else (left, svd.u.mT @ grad)
    return _Projections(svd, s_grad, *sides)


def _is_cheaper(tokens: TokenGradient, svd: SVD, terms: ScoredTerms) -> bool:
    """Return whether the sums over tokens take fewer multiplications than ``G``."""
    num_tokens, rows, num_components, columns = len(tokens.x), svd.u.shape[0], *svd.vh.shape
    num_products = 1 if terms == "sigma" else 2
    per_token = num_products * num_components * (rows + columns)
    formed = num_tokens * rows * columns + num_products * rows * columns * num_components
    return num_tokens * per_token < formed


def _modulus(values: Tensor, squared: bool) -> Tensor:
    return values.square() if squared else values.abs()
