"""Removes experts of mixtures, and what their routers hold for them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import (
    Mixture,
    numbered_experts,
    without_experts,
)
from grasp_lightning.models.operations.base import Applier, Site, register
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.plan import Operation, RemoveExperts


class ExpertsRemover(Applier[RemoveExperts]):
    """Shared experts stay unchanged."""

    operation = RemoveExperts
    verb = "removes experts of"

    def check(self, operation: RemoveExperts, site: Site) -> None:
        """Check that the mixture exists, and that its router can work with the others."""
        name, kept = operation.mixture, operation.kept
        found, mixture = numbered_experts(site.view), _mixture(site.view, operation)
        assert found is not None  # the mixture is from there
        if operation.num_experts != found.number:
            raise PlanError(
                f"the plan removes experts of {name} with {operation.num_experts} experts, the "
                f"model has {found.number}"
            )
        if site.view.layer_of(name) not in site.left:
            raise PlanError(f"the plan removes experts of {name} after dropping its decoder layer")
        if not found.allows(len(kept)) or list(kept) != sorted(set(kept) & {*range(found.number)}):
            groups = f", and a multiple of {found.num_groups}" * (found.num_groups > 1)
            raise PlanError(
                f"the plan keeps experts {list(kept)} of {name}: expected ascending numbers below "
                f"{found.number}, at least {found.least} of them{groups}"
            )
        size = found.number // found.num_groups
        if len({sum(e // size == group for e in kept) for group in range(found.num_groups)}) > 1:
            raise PlanError(
                f"the plan keeps experts {list(kept)} of {name}: expected equally many of each "
                f"group of {size}"
            )
        if is_sharded(site.view.module(mixture.name)):
            raise PlanError(
                f"the plan removes experts of {name}, which trainer.strategy fsdp does not "
                "support: use auto or ddp, or set method.mlp=factors to leave experts unchanged"
            )

    def num_added(self, operation: RemoveExperts, view: DecoderView) -> int:
        """Return minus the number of removed parameters."""
        mixture = _mixture(view, operation)
        return (len(operation.kept) - mixture.layout.number) * mixture.expert_size

    def apply(
        self, view: DecoderView, operation: RemoveExperts, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace the mixture by one with fewer experts; the config stays as it is."""
        del tensors
        mixture = _mixture(view, operation)
        view.set_module(mixture.name, without_experts(view, mixture, operation.kept))


def experts_left(view: DecoderView, operations: Sequence[Operation]) -> int | None:
    """Return how many experts each mixture of a model has after a plan; None if it removes none.

    Raises:
        PlanError: If mixtures would have different numbers.
    """
    kept = {op.experts: len(op.kept) for op in operations if isinstance(op, RemoveExperts)}
    found = numbered_experts(view) if kept else None
    if found is None:
        return None
    dropped = {index for operation in operations for index in operation.dropped}
    remaining = (name for name in found.mixtures if view.layer_of(name) not in dropped)
    left = dict.fromkeys(remaining, found.number)
    numbers = sorted({*(left | kept).values()})
    if len(numbers) > 1:
        raise PlanError(
            f"the plan leaves mixtures with {numbers[0]} and with {numbers[-1]} experts: "
            "all need the same number"
        )
    return numbers[0]


def _mixture(view: DecoderView, operation: RemoveExperts) -> Mixture:
    found = numbered_experts(view)
    mixture = None if found is None else found.mixtures.get(operation.experts)
    if mixture is None or mixture.name != operation.mixture:
        raise PlanError(
            f"the plan removes experts of {operation.mixture}: it is not a mixture whose number of "
            "experts the config says"
        )
    return mixture


register(ExpertsRemover())
