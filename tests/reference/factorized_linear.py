"""A linear with u, s and v as parameters, so that autograd gives their gradients."""

import torch
from torch import Tensor, nn


class FactorizedLinear(nn.Module):
    """``y = x (v diag(s) u^T) + bias``, with u ``(N, K)``, s ``(K,)`` and v ``(M, K)``."""

    def __init__(self, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.u = nn.Parameter(u.clone())
        self.s = nn.Parameter(s.clone())
        self.v = nn.Parameter(v.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    @property
    def weight(self) -> Tensor:
        """The dense weight, ``(N, M)``."""
        return self.u @ torch.diag(self.s) @ self.v.T

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(..., M)``."""
        y = x @ (self.v @ torch.diag(self.s) @ self.u.T)
        return y if self.bias is None else y + self.bias
