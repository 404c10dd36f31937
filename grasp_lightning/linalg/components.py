"""Attribution of the loss to singular components, from the gradient of the dense weight.

Legend: ``W = U diag(s) V^T`` weight ``(N, M)`` with ``K`` singular components ``(u_k, s_k, v_k)``;
``L`` loss; ``G = dL/dW``, ``(N, M)``; ``P = G V``, ``(N, K)``; ``Q = G^T U``, ``(M, K)``.

For parameters ``u``, ``s``, ``v`` of a layer with weight ``U diag(s) V^T`` the chain rule gives
``dL/ds_k = u_k^T G v_k``, ``dL/dU = P diag(s)`` and ``dL/dV = Q diag(s)``, so the model never has
to run in factored form. Flipping the sign of a pair ``(u_k, v_k)`` changes no score.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from grasp_lightning.linalg.factors import SVD

ScoredTerms = Literal["full", "sigma"]
GradientScore = Literal["taylor", "gradient"]


class ComponentGradients(NamedTuple):
    """Gradient of the loss with respect to the parameters of a factorised weight.

    Attributes:
        s: ``dL/ds``, ``(K,)``.
        u: ``dL/dU``, ``(N, K)``.
        v: ``dL/dV``, ``(M, K)``; singular vectors in columns, unlike ``SVD.vh``.
    """

    s: Tensor
    u: Tensor
    v: Tensor


def component_gradients(svd: SVD, weight_grad: Tensor) -> ComponentGradients:
    """Return the gradients of ``U``, ``s`` and ``V`` that belong to a gradient of the weight.

    Args:
        svd: Decomposition of the weight.
        weight_grad: ``G``, the loss gradient of the dense weight, ``(N, M)``, any float dtype.

    Returns:
        Gradients in the wider dtype of ``svd`` and ``weight_grad``, float32 or better.

    Raises:
        ValueError: If ``weight_grad`` has not the shape of the weight.
    """
    if problem := _shape_problem(svd, weight_grad):
        raise ValueError(problem)
    svd, weight_grad = _in_one_dtype(svd, weight_grad)
    left, right = _left_product(svd, weight_grad), _right_product(svd, weight_grad)
    return ComponentGradients(
        s=(svd.u * left).sum(dim=0), u=left * svd.s, v=(right * svd.s[:, None]).mT
    )


def sigma_gradients(svd: SVD, weight_grad: Tensor) -> Tensor:
    """Return the gradients of the singular values alone, ``u_k^T G v_k``.

    Args:
        svd: Decomposition of the weight.
        weight_grad: ``G``, the loss gradient of the dense weight, ``(N, M)``, any float dtype.

    Returns:
        ``dL/ds``, signed, ``(K,)``, in the wider dtype of both, float32 or better.

    Raises:
        ValueError: If ``weight_grad`` has not the shape of the weight.
    """
    if problem := _shape_problem(svd, weight_grad):
        raise ValueError(problem)
    svd, weight_grad = _in_one_dtype(svd, weight_grad)
    return (svd.u * _left_product(svd, weight_grad)).sum(dim=0)


def window_scores(
    svd: SVD, weight_grad: Tensor, *, terms: ScoredTerms, score: GradientScore, squared: bool
) -> Tensor:
    """Score every singular component by its share in the gradient of one calibration window.

    With ``theta`` running over the parameters of component k, ``terms="full"`` returns
    ``|s_k dL/ds_k| + sum_i |u_ik dL/du_ik| + sum_j |v_jk dL/dv_jk|``, the first-order loss change,
    and ``terms="sigma"`` its first addend alone.

    Moduli do not add up over windows: sum these scores over windows for the reductions
    ``absolute`` and ``squared``, and pass the gradient summed over windows for ``signed``.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6.

    Args:
        svd: Decomposition of the weight.
        weight_grad: ``G``, the loss gradient of the dense weight over one window (or the sum of
            it over windows), ``(N, M)``, any float dtype.
        terms: ``full`` scores u, s and v of a component, ``sigma`` its singular value alone.
        score: ``taylor`` takes ``theta dL/dtheta`` of each parameter, ``gradient`` ``dL/dtheta``.
        squared: Square every addend instead of taking its modulus.

    Returns:
        Scores, not negative, ``(K,)``, float32 or better: in the unit of the loss for ``taylor``
        without ``squared``. NaN and infinity in ``weight_grad`` carry through.

    Raises:
        ValueError: If ``terms`` or ``score`` is unknown, or ``weight_grad`` has not the shape of
            the weight.
    """
    # Unchecked, an unknown word would silently score something else than what was asked for.
    if terms not in get_args(ScoredTerms):
        raise ValueError(f"terms must be one of {get_args(ScoredTerms)}, got {terms!r}")
    if score not in get_args(GradientScore):
        raise ValueError(f"score must be one of {get_args(GradientScore)}, got {score!r}")
    if problem := _shape_problem(svd, weight_grad):
        raise ValueError(problem)
    svd, weight_grad = _in_one_dtype(svd, weight_grad)
    left = _left_product(svd, weight_grad)  # (N, K)
    weighted = svd.u * left  # (N, K)
    s_grad = weighted.sum(dim=0)
    is_taylor = score == "taylor"
    scores = _modulus(svd.s * s_grad if is_taylor else s_grad, squared)
    if terms == "sigma":
        return scores
    right = _right_product(svd, weight_grad)  # (K, M)
    u_sum = _modulus(weighted if is_taylor else left, squared).sum(dim=0)
    v_sum = _modulus(svd.vh * right if is_taylor else right, squared).sum(dim=1)
    # dL/dU and dL/dV carry s_k as a common factor of the component, applied once to the sums.
    return scores + _modulus(svd.s, squared) * (u_sum + v_sum)


def _shape_problem(svd: SVD, weight_grad: Tensor) -> str | None:
    expected, got = (svd.u.shape[0], svd.vh.shape[1]), tuple(weight_grad.shape)
    if expected == got:
        return None
    return f"weight_grad must have the shape of the weight, {expected}, got {got}"


def _in_one_dtype(svd: SVD, weight_grad: Tensor) -> tuple[SVD, Tensor]:
    dtype = torch.promote_types(svd.s.dtype, weight_grad.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    u, s, vh = (tensor.detach().to(dtype) for tensor in svd)
    return SVD(u, s, vh), weight_grad.detach().to(dtype)


# Hooks may call from inside a mixed-precision step, where autocast would round both products.
def _left_product(svd: SVD, weight_grad: Tensor) -> Tensor:
    """Return ``P = G V``, ``(N, K)``."""
    with torch.autocast(weight_grad.device.type, enabled=False):
        return weight_grad @ svd.vh.mT


def _right_product(svd: SVD, weight_grad: Tensor) -> Tensor:
    """Return ``Q^T = U^T G``, ``(K, M)``: laid out like ``vh``."""
    with torch.autocast(weight_grad.device.type, enabled=False):
        return svd.u.mT @ weight_grad


def _modulus(values: Tensor, squared: bool) -> Tensor:
    return values.square() if squared else values.abs()
