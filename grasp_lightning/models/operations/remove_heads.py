"""Removes key/value groups of an attention: rows of q, k and v, columns of the output."""

from collections.abc import Mapping

from torch import Tensor, nn

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import fit_heads
from grasp_lightning.models.operations.base import (
    Applier,
    Shapes,
    Site,
    dense_module,
    register,
    whole_bias,
)
from grasp_lightning.models.operations.narrow import check_kept, kept_rows, set_narrowed
from grasp_lightning.models.sharding import whole
from grasp_lightning.models.size import LinearShape
from grasp_lightning.models.units import head_units, heads_problem, part_rows
from grasp_lightning.plan import RemoveHeads


class RemoveGroups(Applier[RemoveHeads]):
    """It needs no tensors: all weights are only selected."""

    operation = RemoveHeads
    verb = "removes heads of"

    def check(self, operation: RemoveHeads, site: Site) -> None:
        """Check that the linears form one attention, and that it has the groups."""
        index = site.view.layer_of(operation.output)
        found = None if index is None else head_units(site.view, index)
        if found is None or found.linears != operation.linears:
            reason = None if index is None or found else heads_problem(site.view, index)
            raise PlanError(
                f"the plan removes heads of {operation.attention}: "
                f"{reason or 'expected all linears of an attention, in their order'}"
            )
        if found.number != operation.num_groups:
            raise PlanError(
                f"the plan removes heads of {operation.attention}: expected "
                f"{operation.num_groups} key/value groups, the model has {found.number}"
            )
        check_kept(operation.groups, found.number, "key/value groups", operation.output)

    def new_shapes(self, operation: RemoveHeads, dense: Shapes) -> dict[str, LinearShape]:
        """Return shapes with fewer rows, and for the output with fewer columns."""
        kept, number = len(operation.groups), operation.num_groups
        output = dense[operation.output]
        shapes = {operation.output: output._replace(columns=output.columns // number * kept)}
        for name in operation.inputs:
            shapes[name] = dense[name]._replace(rows=dense[name].rows // number * kept)
        return {name: shape._replace(is_narrowed=True) for name, shape in shapes.items()}

    def apply(
        self, view: DecoderView, operation: RemoveHeads, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace all linears of the attention by narrowed ones."""
        del tensors
        output, number = dense_module(view, operation.output), operation.num_groups
        width = output.weight.shape[1] // number
        for name in operation.inputs:
            old = dense_module(view, name)
            rows = old.weight.shape[0] // number
            parts = [rows]
            if len(operation.inputs) == 1:  # queries, keys and values in one
                parts = [width, *[(rows - width) // 2] * 2]
            kept = part_rows(parts, number, operation.groups)
            bias = None if old.bias is None else kept_rows(old.bias, kept)
            set_narrowed(view, name, kept_rows(old.weight, kept), bias)
        columns = part_rows([width], number, operation.groups)
        weight = whole(output.weight.detach())
        chosen = weight[:, columns.to(weight.device)].contiguous()
        weight = nn.Parameter(chosen, requires_grad=output.weight.requires_grad)
        set_narrowed(view, operation.output, weight, whole_bias(output))
        fit_heads(view.module(operation.attention))


register(RemoveGroups())
