"""Replaces a linear by two of lower rank."""

from collections.abc import Mapping

from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import LowRankLinear, dense_shape
from grasp_lightning.models.operations.base import (
    Applier,
    Shapes,
    Site,
    dense_module,
    like,
    register,
    whole_bias,
)
from grasp_lightning.models.sharding import shard_like
from grasp_lightning.models.size import LinearShape
from grasp_lightning.plan import FactorizeLinear


class Factorize(Applier[FactorizeLinear]):
    """Its tensors: ``<module>.left`` ``(N, r)`` and ``<module>.right`` ``(r, M)``."""

    operation = FactorizeLinear
    verb = "factorizes"
    noun = "factor"

    def check(self, operation: FactorizeLinear, site: Site) -> None:
        """Check that rank and components are in range."""
        module, rank = operation.module, operation.rank
        largest = site.dense[module].num_components
        if not 1 <= rank <= largest:
            raise PlanError(f"rank of {module} must be from 1 to {largest}, the plan says {rank}")
        components = operation.components
        if components is None:
            return
        if len(components) != rank or len(set(components)) != rank:
            raise PlanError(
                f"{module} has rank {rank}, but the plan keeps components {list(components)}"
            )
        if not all(0 <= component < largest for component in components):
            raise PlanError(
                f"components of {module} must be from 0 to {largest - 1}, the plan keeps "
                f"{list(components)}"
            )

    def new_shapes(self, operation: FactorizeLinear, dense: Shapes) -> dict[str, LinearShape]:
        """Return the shape with its rank."""
        return {operation.module: dense[operation.module]._replace(rank=operation.rank)}

    def tensor_shapes(
        self, operation: FactorizeLinear, dense: Shapes
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of both factors."""
        module, rank, shape = operation.module, operation.rank, dense[operation.module]
        return {f"{module}.left": (shape.rows, rank), f"{module}.right": (rank, shape.columns)}

    def apply(
        self, view: DecoderView, operation: FactorizeLinear, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace the linear by its factors."""
        module = operation.module
        set_factors(view, module, tensors[f"{module}.left"], tensors[f"{module}.right"])


def set_factors(view: DecoderView, module: str, left: Tensor, right: Tensor) -> None:
    """Replace a linear by factors ``(N, r)`` and ``(r, M)``, and keep its bias."""
    old = dense_module(view, module)
    # On the meta device first: values that are replaced at once need no memory or random numbers.
    rows, columns = dense_shape(old)
    new = LowRankLinear(columns, rows, len(right), bias=old.bias is not None, device="meta")
    for factor, given in ((new.left, left), (new.right, right)):
        if new.rank == 0:
            factor._buffers["weight"] = like(given, old.weight).detach()
        else:
            factor.weight = like(given, old.weight)
    new.left.register_parameter("bias", whole_bias(old))
    shard_like(new, old)
    view.set_module(module, new.train(old.training))


register(Factorize())
