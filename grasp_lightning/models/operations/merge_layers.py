"""Merges decoder layers into one, or notes the outcome of a trial."""

from collections.abc import Mapping

from torch import Tensor

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.merging import merge_problem, merge_weights
from grasp_lightning.models.operations.base import Applier, Site, register
from grasp_lightning.plan import MergeLayers, TryMerge


class Merge(Applier[MergeLayers]):
    """One layer gets the merged weights, the others are deleted; it needs no tensors."""

    operation = MergeLayers
    verb = "merges"

    def check(self, operation: MergeLayers, site: Site) -> None:
        """Check that the layers follow each other and can be merged."""
        _check_layers(operation, site)
        try:
            site.view.check_droppable()
        except ModelError as error:
            raise PlanError(f"the plan merges decoder layers: {error}") from error
        problem = merge_problem(site.view)
        if problem is not None:
            raise PlanError(f"the plan merges decoder layers, but {problem}")

    def apply(
        self, view: DecoderView, operation: MergeLayers, tensors: Mapping[str, Tensor]
    ) -> None:
        """Merge the weights and delete the absorbed layers."""
        del tensors
        merge_weights(view, operation)
        view.drop(operation.absorbed)


class Try(Applier[TryMerge]):
    """A merge was tried and undone."""

    operation = TryMerge

    def check(self, operation: TryMerge, site: Site) -> None:
        """Check that the layers follow each other."""
        _check_layers(operation, site)

    def apply(self, view: DecoderView, operation: TryMerge, tensors: Mapping[str, Tensor]) -> None:
        """Change nothing."""
        del view, operation, tensors


def _check_layers(operation: MergeLayers | TryMerge, site: Site) -> None:
    left = sorted(site.left)
    if operation.base not in site.left:
        raise PlanError(f"the plan merges into layer {operation.base}, the model has {left}")
    start = left.index(operation.base) + 1
    following = left[start : start + len(operation.absorbed)]
    if following != list(operation.absorbed):
        raise PlanError(
            f"the plan merges decoder layers {list(operation.absorbed)} into layer "
            f"{operation.base}, which is followed by {left[start:]}"
        )


register(Merge(), Try())
