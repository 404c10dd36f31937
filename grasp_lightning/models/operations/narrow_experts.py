"""Removes inner channels of experts: of each expert its own ones, of all equally many."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import (
    MULTIPLE,
    READER,
    ExpertsLayout,
    kept_parameters,
    set_experts,
)
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.operations.base import Applier, Site, register
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.plan import NarrowExperts, RemoveExperts


def narrow_experts(experts: str, kept: Iterable[Sequence[int]]) -> NarrowExperts:
    """Return the operation that keeps these channels of each expert, equally many of all."""
    masks = []
    for channels in kept:
        bits = ["0"] * (max(channels) + 1)
        for channel in channels:
            bits[-1 - channel] = "1"
        masks.append(int("".join(bits), 2))
    width = masks[0].bit_count()
    return NarrowExperts(experts=experts, width=width, channels=tuple(f"{m:x}" for m in masks))


def kept_channels(operation: NarrowExperts) -> Tensor:
    """Return the kept channels of each expert, ascending, ``(E, k)``, int64."""
    rows = []
    for mask in operation.channels:
        bits = f"{int(mask, 16):b}"[::-1]
        rows.append([channel for channel, bit in enumerate(bits) if bit == "1"])
    return torch.tensor(rows)


class ExpertsNarrower(Applier[NarrowExperts]):
    """Its tensor is the weight that reads the k kept channels, ``<experts>.down_proj``.

    Its shape is ``(E, H, k)``, however the family stores it.
    """

    operation = NarrowExperts
    verb = "narrows"
    noun = "weight"

    def check(self, operation: NarrowExperts, site: Site) -> None:
        """Check that the model has the experts, and these their channels."""
        name, view = operation.experts, site.view
        layout = _layout(view, operation)
        if view.layer_of(name) not in site.left:
            raise PlanError(f"the plan narrows {name} after dropping its decoder layer")
        if not 1 <= operation.width < layout.width or operation.width % MULTIPLE:
            raise PlanError(
                f"the plan keeps {operation.width} channels of {name}: it must keep fewer than "
                f"{layout.width}, and a multiple of {MULTIPLE}"
            )
        _check_masks(operation, layout, _number_left(operation, site, layout))
        if is_sharded(view.module(name)):
            raise PlanError(
                f"the plan narrows {name}, which trainer.strategy fsdp does not support: use auto "
                "or ddp, or set method.mlp=factors to leave experts unchanged"
            )

    def own_tensors(self, operation: NarrowExperts, view: DecoderView) -> dict[str, Tensor]:
        """Return an empty weight."""
        layout = _layout(view, operation)
        stored = view.module(operation.experts).get_parameter(READER)
        shape = (len(operation.channels), layout.hidden, operation.width)
        return {f"{operation.experts}.{READER}": stored.new_empty(shape, device="meta")}

    def num_added(self, operation: NarrowExperts, view: DecoderView) -> int:
        """Return minus the number of removed parameters."""
        layout = _layout(view, operation)
        size = layout.channel_size // layout.number * len(operation.channels)
        return (operation.width - layout.width) * size

    def apply(
        self, view: DecoderView, operation: NarrowExperts, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace the experts by narrower ones."""
        old, layout = view.module(operation.experts), _layout(view, operation)
        reader = tensors[f"{operation.experts}.{READER}"]
        new = kept_parameters(old, layout, kept_channels(operation), reader)
        narrowed = _without_copies(old)
        set_experts(narrowed, operation.width, new)
        view.set_module(operation.experts, narrowed)


def _layout(view: DecoderView, operation: NarrowExperts) -> ExpertsLayout:
    name = operation.experts
    index = view.layer_of(name)
    try:
        found = {} if index is None else experts_in(view, index)
    except ModelError as error:
        raise PlanError(f"the plan narrows {name}: {error}") from error
    if name not in found:
        raise PlanError(
            f"the plan narrows {name}: it is not a module of experts with stacked weights, or was "
            "narrowed already"
        )
    return found[name]


def _number_left(operation: NarrowExperts, site: Site, layout: ExpertsLayout) -> int:
    """Return how many experts are left before the operation."""
    removals = (op for op in site.earlier if isinstance(op, RemoveExperts))
    kept = (len(op.kept) for op in removals if op.experts == operation.experts)
    return next(kept, layout.number)


def _check_masks(operation: NarrowExperts, layout: ExpertsLayout, number: int) -> None:
    name = operation.experts
    if len(operation.channels) != number:
        raise PlanError(
            f"the plan keeps channels of {len(operation.channels)} experts of {name}, which has "
            f"{number}"
        )
    for expert, text in enumerate(operation.channels):
        mask = _mask(text)
        if mask is None or mask >> layout.width or mask.bit_count() != operation.width:
            raise PlanError(
                f"the plan narrows {name}: channels of expert {expert} must be a hexadecimal "
                f"number with {operation.width} of {layout.width} bits set, got {text[:40]!r}"
            )


def _mask(text: str) -> int | None:
    try:
        return int(text, 16) if text.isalnum() else None
    except ValueError:
        return None


def _without_copies(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its parameters and config."""
    shared = [*module.parameters(), *module.buffers(), getattr(module, "config", None)]
    return copy.deepcopy(module, {id(value): value for value in shared})


register(ExpertsNarrower())
