"""Rounding of float32 matrix products, on machines whose CPUs do not round them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm}


class RoundedProducts(TorchDispatchMode):
    """Rounds the second matrix of float32 products to bfloat16, where torch's settings allow it.

    GPUs and newer CPUs round both. Rounding one makes a Gram matrix as asymmetric as other orders
    of summation do there.

    Attributes:
        num_rounded: Products that were rounded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_rounded = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),  # Any: arguments of any operator
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        del types
        run: Callable[..., object] = func
        allowed = torch.get_float32_matmul_precision() != "highest"
        if allowed and func.overloadpacket in _PRODUCTS and args[-1].dtype == torch.float32:
            self.num_rounded += 1
            second: Tensor = args[-1]
            args = (*args[:-1], second.bfloat16().float())
        return run(*args, **(kwargs or {}))
