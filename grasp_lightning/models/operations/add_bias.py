"""Gives a linear that has lost inputs a bias."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import NarrowedLinear, dense_shape
from grasp_lightning.models.operations.base import Applier, Site, dense_module, like, register
from grasp_lightning.models.operations.narrow import set_narrowed
from grasp_lightning.models.sharding import whole
from grasp_lightning.plan import AddBias


class Bias(Applier[AddBias]):
    """Its tensor: ``<module>.bias``, ``(N,)``, which replaces an earlier bias."""

    operation = AddBias
    verb = "adds a bias to"
    noun = "bias"

    def check(self, operation: AddBias, site: Site) -> None:
        """Check that the linear is narrowed before."""
        shape = site.replaced.get(operation.module)
        if shape is None or not shape.is_narrowed:
            raise PlanError(
                f"the plan adds a bias to {operation.module}: expected a linear that it narrows "
                "before"
            )

    def own_tensors(self, operation: AddBias, view: DecoderView) -> dict[str, Tensor]:
        """Return an empty bias."""
        linear = dense_module(view, operation.module, self.verb)
        rows, dtype = dense_shape(linear)[0], linear.weight.dtype
        empty = torch.empty(rows, dtype=dtype, device="meta")
        return {f"{operation.module}.bias": empty}

    def num_added(self, operation: AddBias, view: DecoderView) -> int:
        """Return the size of the bias, or 0 if the linear has one."""
        linear = dense_module(view, operation.module, self.verb)
        return dense_shape(linear)[0] if linear.bias is None else 0

    def apply(self, view: DecoderView, operation: AddBias, tensors: Mapping[str, Tensor]) -> None:
        """Replace the linear by one with the bias."""
        old = view.module(operation.module)
        assert isinstance(old, NarrowedLinear)  # an earlier operation has narrowed it
        weight = nn.Parameter(whole(old.weight.detach()), requires_grad=old.weight.requires_grad)
        bias = like(tensors[f"{operation.module}.bias"], weight)
        new = set_narrowed(view, operation.module, weight, bias)
        new.adds_bias = old.adds_bias or old.bias is None


register(Bias())
