"""Adds a linear map to the hidden states where decoder layers were deleted."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import SEAM_AFTER, SEAM_BEFORE, SeamLinear, set_seam
from grasp_lightning.models.operations.base import Applier, Site, like, register
from grasp_lightning.models.sharding import shard_like
from grasp_lightning.plan import AddSeam


class Add(Applier[AddSeam]):
    """Its tensor: ``<holder>.<seam or seam_after>.weight``, ``(C, C)``."""

    operation = AddSeam
    verb = "adds a seam to"
    noun = "weight"

    def check(self, operation: AddSeam, site: Site) -> None:
        """Check that the layers are gone, and that the holder remains and has no such seam."""
        holder, name = operation.holder, _name(operation)
        present = sorted(site.left & set(operation.layers))
        if present or not operation.layers:
            raise PlanError(
                f"the plan adds a seam for decoder layers {list(operation.layers)}: expected "
                f"deleted layers, {present} remain"
            )
        if holder not in site.left:
            raise PlanError(f"the plan adds a seam to decoder layer {holder}, which is deleted")
        if hasattr(site.view.layer(holder), name):
            raise PlanError(f"the plan adds a seam to decoder layer {holder}, which has one")

    def own_tensors(self, operation: AddSeam, view: DecoderView) -> dict[str, Tensor]:
        """Return an empty weight."""
        size = view.model.config.get_text_config().hidden_size
        weight = _reference(view, operation.holder)
        empty = torch.empty(size, size, dtype=weight.dtype, device="meta")
        return {f"{_module(view, operation)}.weight": empty}

    def num_added(self, operation: AddSeam, view: DecoderView) -> int:
        """Return the size of the weight."""
        return sum(weight.numel() for weight in self.own_tensors(operation, view).values())

    def apply(self, view: DecoderView, operation: AddSeam, tensors: Mapping[str, Tensor]) -> None:
        """Put the seam into its layer."""
        layer = view.layer(operation.holder)
        weight = tensors[f"{_module(view, operation)}.weight"]
        size = len(weight)
        seam = SeamLinear(size, size, bias=False, device="meta")
        seam.weight = like(weight, _reference(view, operation.holder))
        shard_like(seam, layer)
        set_seam(layer, _name(operation), seam.train(layer.training))


def _name(operation: AddSeam) -> str:
    return SEAM_AFTER if operation.is_after else SEAM_BEFORE


def _module(view: DecoderView, operation: AddSeam) -> str:
    return f"{view.layers_name}.{operation.holder}.{_name(operation)}"


def _reference(view: DecoderView, index: int) -> Tensor:
    """Return the first parameter of a layer in floating point."""
    return next(p for p in view.layer(index).parameters() if p.is_floating_point())


register(Add())
