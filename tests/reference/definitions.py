"""Quantities of the field that only tests need, by their definitions."""

from typing import NamedTuple

from torch import Tensor

from grasp_lightning.linalg.factors import SVD
from grasp_lightning.linalg.layers import cosine_sum


def block_influence(hidden_in: Tensor, hidden_out: Tensor, mask: Tensor) -> Tensor:
    """Return one minus the mean cosine between the input and the output of a decoder layer.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, definition of Block Influence.
    """
    return (1 - cosine_sum(hidden_in, hidden_out, mask) / mask.sum()).float()


class ComponentGradients(NamedTuple):
    """Gradients ``dL/ds``, ``(K,)``, ``dL/dU``, ``(N, K)``, and ``dL/dV``, ``(M, K)``."""

    s: Tensor
    u: Tensor
    v: Tensor


def component_gradients(svd: SVD, weight_grad: Tensor) -> ComponentGradients:
    """Return the gradients of ``U``, ``s`` and ``V`` that belong to a gradient of the weight."""
    left, right = weight_grad @ svd.vh.mT, svd.u.mT @ weight_grad
    s_grad = (svd.u * left).sum(dim=0)
    return ComponentGradients(s=s_grad, u=left * svd.s, v=(right * svd.s[:, None]).mT)


def curvature_error(weight_change: Tensor, a_gram: Tensor | None, c_gram: Tensor | None) -> Tensor:
    """Return ``tr(A D C D^T)`` of a change D in metrics A and C: matrices, diagonals or None."""
    change = product = weight_change.detach().double()
    if a_gram is not None:
        metric = a_gram.double()
        product = metric[:, None] * change if metric.ndim == 1 else metric @ change
    if c_gram is not None:
        metric = c_gram.double()
        change = change * metric if metric.ndim == 1 else change @ metric
    # The inner product of A D and D C, as both metrics are symmetric.
    return (product * change).sum()
