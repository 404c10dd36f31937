"""Sets weights of a linear to zero, and keeps its shape."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import TransposedLinear, as_linear
from grasp_lightning.models.operations.base import Applier, Shapes, Site, dense_module, register
from grasp_lightning.models.sharding import copy_into
from grasp_lightning.plan import SparsifyLinear


class Sparsify(Applier[SparsifyLinear]):
    """Its tensor is the weight with the zeros, ``<module>.weight`` ``(N, M)``."""

    operation = SparsifyLinear
    verb = "sparsifies"
    noun = "weight"

    def check(self, operation: SparsifyLinear, site: Site) -> None:
        """Check that the weight can have the pattern and as many zeros."""
        module, zeros, shape = operation.module, operation.zeros, site.dense[operation.module]
        if not 0 <= zeros <= shape.parameters:
            raise PlanError(
                f"zeros of {module} must be from 0 to {shape.parameters}, the plan says {zeros}"
            )
        if operation.groups is not None:
            count, size = operation.groups
            if shape.columns % size or zeros * size != shape.parameters * count:
                raise PlanError(
                    f"the plan sets {zeros} weights of {module} to zero, which is not the pattern "
                    f"{operation.pattern} of its shape {(shape.rows, shape.columns)}"
                )

    def tensor_shapes(self, operation: SparsifyLinear, dense: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shape of the weight."""
        shape = dense[operation.module]
        return {f"{operation.module}.weight": (shape.rows, shape.columns)}

    def apply(
        self, view: DecoderView, operation: SparsifyLinear, tensors: Mapping[str, Tensor]
    ) -> None:
        """Copy the values into the weight."""
        linear = dense_module(view, operation.module)
        weight = tensors[f"{operation.module}.weight"]
        is_transposed = isinstance(as_linear(linear), TransposedLinear)
        with torch.no_grad():
            copy_into(linear.weight, weight.mT if is_transposed else weight)


register(Sparsify())
