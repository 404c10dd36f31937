"""What every operation of a plan offers: a check, new shapes, its tensors, its application."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
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
    """Where an operation would be applied.

    Attributes:
        view: The model, on which nothing of the plan is done yet.
        dense: Shapes of the linears of the operation.
        left: Decoder layers that the plan has not dropped before.
    """

    view: DecoderView
    dense: Shapes
    left: AbstractSet[int]


class Applier(ABC, Generic[Op]):
    """The behaviour of one operation; it has no state.

    Attributes:
        operation: The dataclass in ``plan`` that stands for it.
        verb: What it does to a linear, for messages.
        noun: What its tensors are, for messages.
    """

    operation: type[Op]
    verb: ClassVar[str] = "changes"
    noun: ClassVar[str] = "tensor"

    @abstractmethod
    def check(self, operation: Op, site: Site) -> None:
        """Raise a ``PlanError`` if an operation does not fit; its linears are there, and dense."""

    def new_shapes(self, operation: Op, dense: Shapes) -> dict[str, LinearShape]:
        """Return the shapes of what takes the place of its linears, by name."""
        return {name: dense[name] for name in operation.linears}

    def tensor_shapes(self, operation: Op, dense: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors, by name: ``<module>.<part>`` of one of its linears."""
        del operation, dense
        return {}

    @abstractmethod
    def apply(self, view: DecoderView, operation: Op, tensors: Mapping[str, Tensor]) -> None:
        """Change a model; operation and tensors are known to fit."""


# Any: each is for operations of one type
APPLIERS: Final[dict[type[Operation], Applier[Any]]] = {}


def register(*appliers: Applier[Any]) -> None:  # Any: as above
    """Let plans that hold their operations be applied."""
    APPLIERS.update((applier.operation, applier) for applier in appliers)


def applier_of(operation: Operation) -> Applier[Any]:  # Any: as above
    """Return the behaviour of an operation."""
    return APPLIERS[type(operation)]


def dense_module(view: DecoderView, module: str, verb: str = "changes") -> DenseModule:
    """Return a linear that a plan replaces; a ``PlanError`` says that it is none that can be."""
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
            f"the plan {verb} {module}: it is part of a mixture of experts, or of a linear that "
            f"is low-rank already, or is narrowed already"
        )
    if not linear.weight.is_floating_point():
        raise PlanError(f"weight of {module} must be floating point, got {linear.weight.dtype}")
    return linear


def like(tensor: Tensor, weight: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter of its own, in other respects like the weight it replaces."""
    own = tensor.detach().to(
        device=weight.device, dtype=weight.dtype, copy=True, memory_format=torch.contiguous_format
    )
    return nn.Parameter(own, requires_grad=weight.requires_grad)


def whole_bias(linear: DenseModule) -> nn.Parameter | None:
    """Return the bias of a linear itself, or a whole copy where this process holds a part of it."""
    bias = linear.bias
    if not isinstance(bias, DTensor):
        return bias
    return nn.Parameter(whole(bias.detach()), requires_grad=bias.requires_grad)
