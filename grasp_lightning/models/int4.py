"""A linear with int4 weights of torchao, for every shape and activation type.

This file imports only torch: like ``lowrank.py``, its text is copied into saved models.

torchao stores int4 weights in a plain layout (``Int4Tensor``), which a GPU reads as it is. The
kernel of the CPU wants another one, which depends on its vector instructions
(``Int4OpaqueTensor``), so weights are packed after loading and unpacked before saving. Both kernels
compute in bfloat16. Widths are padded with zeros, which changes no result.

Legend: N output and M input features, G = 32 weights of one row that share scale and zero point.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

INT4_GROUP = 32
_PLAIN, _PACKED = "Int4Tensor", "Int4OpaqueTensor"
_OFFSET, _LOW_BITS = 8, 0xF


class Int4Linear(nn.Linear):
    """A linear whose weight is an int4 tensor of torchao, perhaps padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weight in bfloat16, ``(..., in_features)`` -> ``(..., out_features)``."""
        rows, columns = self.weight.shape
        half = x.to(torch.bfloat16)
        if columns != self.in_features:
            half = pad(half, (0, columns - self.in_features))
        y = linear(half, self.weight)
        if rows != self.out_features:
            y = y[..., : self.out_features]
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias


def is_int4(tensor: object) -> bool:
    """Return whether a tensor is an int4 tensor of torchao, in either layout."""
    return type(tensor).__name__ in {_PLAIN, _PACKED}


def as_int4_linear(holder: nn.Linear) -> Int4Linear:
    """Return the linear that computes with the int4 weight of another, with its sizes and bias."""
    weight: Tensor = holder.weight
    if type(weight).__name__ == _PLAIN and weight.device.type == "cpu":
        weight = packed_for_cpu(weight)
    with torch.device("meta"):
        made = Int4Linear(holder.in_features, holder.out_features, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.register_parameter("bias", holder.bias)
    return made.train(holder.training)


def packed_for_cpu(tensor: Tensor) -> Tensor:
    """Return a plain int4 tensor, ``(N, M)``, in the layout of this CPU."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor  # noqa: PLC0415

    plain: Any = tensor  # Any: torchao has no types
    codes = torch.stack([plain.qdata & _LOW_BITS, (plain.qdata >> 4) & _LOW_BITS], dim=-1)
    codes = (codes ^ _OFFSET).flatten(-2).to(torch.int32)  # (N, M), from 0 to 15
    scales = torch.stack([plain.scale, plain.zero_point], dim=-1).contiguous()  # (M / G, N, 2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    made: Tensor = Int4OpaqueTensor(packed, scales, list(plain.block_size), plain.shape)
    return made


def unpacked(tensor: Tensor) -> Tensor:
    """Return an int4 tensor in the plain layout."""
    if type(tensor).__name__ == _PLAIN:
        return tensor
    from torchao.quantization import Int4Tensor  # noqa: PLC0415

    # The layout is private to the kernel, but its product with the identity gives the codes.
    packed: Any = tensor  # Any: torchao has no types
    unit = torch.zeros_like(packed.scale_and_zero)
    unit[..., 0] = 1
    eye = torch.eye(packed.shape[1], dtype=unit.dtype)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, packed.qdata, INT4_GROUP, unit)
    codes = product.mT.to(torch.int8).contiguous() & _LOW_BITS  # (N, M), two's complement
    qdata = codes[:, ::2] | (codes[:, 1::2] << 4)
    scale, zero_point = (part.contiguous() for part in packed.scale_and_zero.unbind(-1))
    made: Tensor = Int4Tensor(qdata, scale, zero_point, list(packed.block_size), packed.shape)
    return made
