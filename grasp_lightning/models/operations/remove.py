"""Removes blocks and drops decoder layers, or marks layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.models.operations.base import Applier, Shapes, Site, dense_module, register
from grasp_lightning.models.operations.factorize import set_factors
from grasp_lightning.models.size import LinearShape
from grasp_lightning.plan import DropLayers, RemoveBlock, SelectLayers


class Remove(Applier[RemoveBlock]):
    """The linears of a block get rank 0."""

    operation = RemoveBlock
    verb = "removes"

    def check(self, operation: RemoveBlock, site: Site) -> None:
        """Check that the block has linears, each once."""
        if not site.dense or len(site.dense) != len(operation.modules):
            raise PlanError(
                f"the plan removes {operation.block}: expected its linears, each once, got "
                f"{list(operation.modules)}"
            )

    def new_shapes(self, operation: RemoveBlock, dense: Shapes) -> dict[str, LinearShape]:
        """Return shapes of rank 0."""
        return {module: dense[module]._replace(rank=0) for module in operation.modules}

    def apply(
        self, view: DecoderView, operation: RemoveBlock, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace all linears by factors of rank 0."""
        del tensors
        for module in operation.modules:
            rows, columns = dense_shape(dense_module(view, module))
            set_factors(view, module, torch.empty(rows, 0), torch.empty(0, columns))


class Drop(Applier[DropLayers]):
    """Decoder layers are deleted, and the remaining ones renumbered."""

    operation = DropLayers

    def check(self, operation: DropLayers, site: Site) -> None:
        """Check that the layers exist, and that the others do not depend on their numbers."""
        try:
            site.view.check_droppable()
        except ModelError as error:
            raise PlanError(f"the plan drops decoder layers: {error}") from error
        _check_layers(operation.layers, site)

    def apply(
        self, view: DecoderView, operation: DropLayers, tensors: Mapping[str, Tensor]
    ) -> None:
        """Delete the layers."""
        del tensors
        view.drop(operation.layers)


class Select(Applier[SelectLayers]):
    """Decoder layers are marked for a later step."""

    operation = SelectLayers

    def check(self, operation: SelectLayers, site: Site) -> None:
        """Check that the layers exist."""
        _check_layers(operation.layers, site)

    def apply(
        self, view: DecoderView, operation: SelectLayers, tensors: Mapping[str, Tensor]
    ) -> None:
        """Change nothing."""
        del view, operation, tensors


def _check_layers(layers: Sequence[int], site: Site) -> None:
    if len(set(layers)) != len(layers):
        raise PlanError(f"the plan names a decoder layer twice in {list(layers)}")
    missing = sorted(set(layers) - site.left)
    if missing:
        left = sorted(site.left)
        raise PlanError(f"the plan names decoder layers {missing}, the model has {left}")


register(Remove(), Drop(), Select())
