"""Replaces rows of an embedding or head by factors, group by group."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.factored_rows import (
    FactorizedEmbedding,
    FactorizedHead,
    RowGroups,
    TiedHead,
)
from grasp_lightning.models.operations.base import Applier, Site, like, register
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.models.vocabulary.ends import embedding_scale
from grasp_lightning.plan import FactorizeRows


class RowFactorizer(Applier[FactorizeRows]):
    """Its tensors, for each factorised group g: ``<module>.left_g`` and ``<module>.right_g``.

    Their shapes are ``(V_g, r_g)``, rows in the order of the tokens' ids, and ``(r_g, d)``.
    """

    operation = FactorizeRows
    verb = "factorizes"
    noun = "factor"

    def check(self, operation: FactorizeRows, site: Site) -> None:
        """Check that the modules are a dense embedding or head, and the groups fit its rows."""
        view = site.view
        size, features = _matrix(view, operation).shape
        name, digits, ranks = operation.modules[0], operation.groups, operation.group_ranks
        if len(digits) != size or not (digits.isascii() and digits.isdigit()):
            raise PlanError(
                f"the plan factorizes {name}: groups must be one digit for each of {size} rows"
            )
        if int(max(digits)) > len(ranks) or not any(ranks):
            raise PlanError(f"the plan factorizes {name}: a group has no rank, or all stay dense")
        for group, rank in enumerate(ranks, start=1):
            largest = min(digits.count(str(group)), features)
            if not 0 <= rank <= largest:
                raise PlanError(
                    f"rank of group {group} of {name} must be from 0 to {largest}, the plan says "
                    f"{rank}"
                )
        if is_sharded(view.module(name)):
            raise PlanError(
                f"the plan factorizes {name}, which trainer.strategy fsdp does not support: use "
                "auto or ddp, or set method.embeddings=none"
            )

    def own_tensors(self, operation: FactorizeRows, view: DecoderView) -> dict[str, Tensor]:
        """Return empty factors."""
        weight, found = _matrix(view, operation), dict[str, Tensor]()
        for group, rank in _ranks(operation).items():
            size = operation.groups.count(str(group))
            left, right = left_key(operation, group), right_key(operation, group)
            found[left] = weight.new_empty((size, rank), device="meta")
            found[right] = weight.new_empty((rank, weight.shape[1]), device="meta")
        return found

    def num_added(self, operation: FactorizeRows, view: DecoderView) -> int:
        """Return the size of the factors less that of the rows that they replace."""
        features = _matrix(view, operation).shape[1]
        sizes = {g: operation.groups.count(str(g)) for g in _ranks(operation)}
        return sum(
            rank * (sizes[g] + features) - sizes[g] * features
            for g, rank in _ranks(operation).items()
        )

    def apply(
        self, view: DecoderView, operation: FactorizeRows, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace the module, and a head that is tied to it."""
        old: Any = view.module(operation.modules[0])  # Any: an embedding or a linear
        new = _filled(_empty(operation, old), operation, old.weight, tensors)
        view.set_module(operation.modules[0], new.train(old.training))
        for name in operation.modules[1:]:
            head: Any = view.module(name)  # Any: a linear
            assert isinstance(new, FactorizedEmbedding)  # checked: a head has no tied ones
            view.set_module(name, TiedHead(new, head.bias).train(head.training))


def left_key(operation: FactorizeRows, group: int) -> str:
    """Return the name of the left factor of a group."""
    return f"{operation.modules[0]}.left_{group}"


def right_key(operation: FactorizeRows, group: int) -> str:
    """Return the name of the right factor of a group."""
    return f"{operation.modules[0]}.right_{group}"


def _ranks(operation: FactorizeRows) -> dict[int, int]:
    """Return the rank of each factorised group by its number."""
    return {group: rank for group, rank in enumerate(operation.group_ranks, 1) if rank}


def _matrix(view: DecoderView, operation: FactorizeRows) -> Tensor:
    """Return the dense matrix of the modules; a ``PlanError`` if they have none in common."""
    weights: list[Tensor] = []
    for number, name in enumerate(operation.modules):
        try:
            module = view.module(name)
        except ModelError as error:
            raise PlanError(f"the plan factorizes {name}: {error}") from error
        kinds = nn.Linear if number else nn.Embedding | nn.Linear
        if not isinstance(module, kinds):
            raise PlanError(
                f"the plan factorizes rows of {name}: expected a dense embedding or head, the "
                f"model has {type(module).__name__}"
            )
        weights.append(module.weight)
    named = view.model.named_modules(remove_duplicate=False)
    owners = [name for name, module in named if weights and _holds(module, weights[0])]
    if not owners or sorted(owners) != sorted(operation.modules):
        raise PlanError(
            f"the plan factorizes {list(operation.modules)} together: expected all modules that "
            f"share one weight, which are {owners or 'none'}"
        )
    return weights[0]


def _holds(module: nn.Module, weight: Tensor) -> bool:
    return any(parameter is weight for parameter in module.parameters(recurse=False))


def _empty(operation: FactorizeRows, old: Any) -> RowGroups:  # noqa: ANN401  as in apply
    ranks = _ranks(operation)
    sizes = [operation.groups.count(str(group)) for group in ranks]
    sizes, own = [len(operation.groups) - sum(sizes), *sizes], [*ranks.values()]
    features = old.weight.shape[1]
    if isinstance(old, nn.Embedding):
        scale = embedding_scale(old)
        return FactorizedEmbedding(sizes, own, features, scale=scale, device="meta")
    new = FactorizedHead(sizes, own, features, device="meta")
    new.register_parameter("bias", old.bias)
    return new


def _filled(
    new: RowGroups, operation: FactorizeRows, weight: Tensor, tensors: Mapping[str, Tensor]
) -> RowGroups:
    """Give a module on the meta device its values."""
    ranks = _ranks(operation)
    places = {group: place for place, group in enumerate(ranks, start=1)}
    digits = torch.tensor([places.get(int(digit), 0) for digit in operation.groups])
    order = torch.sort(digits, stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    new.position = position.to(device=weight.device, dtype=torch.int32)
    dense = torch.nonzero(digits == 0)[:, 0].to(weight.device)
    new.weight = like(weight.detach()[dense], weight)
    for group, place in places.items():
        left, right = tensors[left_key(operation, group)], tensors[right_key(operation, group)]
        setattr(new, f"left_{place}", like(left, weight))
        setattr(new, f"right_{place}", like(right, weight))
    return new


register(RowFactorizer())
