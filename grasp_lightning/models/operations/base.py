"""The interface of plan operations: checks, new shapes, tensors, and application."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.sharding import whole
from grasp_lightning.models.size import LinearShape
from grasp_lightning.plan import Operation

Op = TypeVar("Op", bound=Operation)
Shapes = Mapping[str, LinearShape]


class Site(NamedTuple):
    """The model before a plan, and what matters to one of its operations.

    Attributes:
        dense: The linears of the operation.
        left: The layers left before it.
        replaced: Shapes of the linears replaced before it, by full name.
        earlier: The operations before it.
    """

    view: DecoderView
    dense: Shapes
    left: AbstractSet[int]
    replaced: Shapes = MappingProxyType({})
    earlier: tuple[Operation, ...] = ()


class Applier(ABC, Generic[Op]):
    """The behaviour of one operation, without state; verb and noun are for messages."""

    operation: type[Op]
    verb: ClassVar[str] = "changes"
    noun: ClassVar[str] = "tensor"

    @abstractmethod
    def check(self, operation: Op, site: Site) -> None:
        """Raise a ``PlanError`` if an operation does not fit; its linears exist and are dense."""

    def new_shapes(self, operation: Op, dense: Shapes) -> dict[str, LinearShape]:
        """Return the shapes of the modules that replace its linears, by name."""
        return {name: dense[name] for name in operation.linears}

    def tensor_shapes(self, operation: Op, dense: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors by name: ``<module>.<part>`` of one of its linears."""
        del operation, dense
        return {}

    def own_tensors(self, operation: Op, view: DecoderView) -> dict[str, Tensor]:
        """Return tensors like those that belong to no linear, by name; only shape and dtype count.

        The model is the one before the plan.
        """
        del operation, view
        return {}

    def num_added(self, operation: Op, view: DecoderView) -> int:
        """Return the number of parameters in modules that replace no linear."""
        del operation, view
        return 0

    @abstractmethod
    def apply(self, view: DecoderView, operation: Op, tensors: Mapping[str, Tensor]) -> None:
        """Change a model; operation and tensors have been checked."""


# Any: each is for operations of one type
APPLIERS: Final[dict[type[Operation], Applier[Any]]] = {}


def register(*appliers: Applier[Any]) -> None:  # Any: as above
    """Register the appliers of operations, so that plans may contain these."""
    APPLIERS.update((applier.operation, applier) for applier in appliers)


def applier_of(operation: Operation) -> Applier[Any]:  # Any: as above
    """Return the applier of an operation."""
    return APPLIERS[type(operation)]


def dense_module(view: DecoderView, module: str, verb: str = "changes") -> DenseModule:
    """Return a linear that a plan replaces; a ``PlanError`` if it cannot be replaced."""
    try:
        linear = view.module(module)
    except ModelError as error:
        raise PlanError(f"the plan {verb} {module}: {error}") from error
    if not isinstance(linear, DenseModule):
        raise PlanError(
            f"the plan {verb} {module}: expected a Linear, the model has {type(linear).__name__}"
        )
    index = view.layer_of(module)
    if index is not None and module not in view.dense_modules(index):
        raise PlanError(
            f"the plan {verb} {module}: it is part of a mixture of experts, or was already "
            "replaced by factors or narrowed"
        )
    if not linear.weight.is_floating_point():
        raise PlanError(f"weight of {module} must be floating point, got {linear.weight.dtype}")
    return linear


def like(tensor: Tensor, weight: Tensor) -> nn.Parameter:
    """Return a copy of a tensor as a parameter that is otherwise like the weight it replaces."""
    own = tensor.detach().to(
        device=weight.device, dtype=weight.dtype, copy=True, memory_format=torch.contiguous_format
    )
    return nn.Parameter(own, requires_grad=weight.requires_grad)


def whole_bias(linear: DenseModule) -> nn.Parameter | None:
    """Return the bias of a linear itself, or a whole copy if it is sharded."""
    bias = linear.bias
    if not isinstance(bias, DTensor):
        return bias
    return nn.Parameter(whole(bias.detach()), requires_grad=bias.requires_grad)
