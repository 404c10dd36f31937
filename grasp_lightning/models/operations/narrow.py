"""Removes hidden channels of an MLP: rows of their writers, columns of their reader."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_lightning.errors import PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import NarrowedLinear, dense_shape
from grasp_lightning.models.operations.base import (
    Applier,
    Shapes,
    Site,
    dense_module,
    like,
    register,
    whole_bias,
)
from grasp_lightning.models.sharding import shard_like, whole
from grasp_lightning.models.size import LinearShape
from grasp_lightning.plan import NarrowMlp


class Narrow(Applier[NarrowMlp]):
    """Its tensor is the reader's weight on the k kept channels, ``<reader>.weight`` ``(N, k)``.

    A writer whose outputs are c times the I channels of the MLP consists of c parts (gate and up).
    It keeps the rows ``j + p I`` of each kept channel j, p from 0 to c - 1.
    """

    operation = NarrowMlp
    verb = "narrows"
    noun = "weight"

    def check(self, operation: NarrowMlp, site: Site) -> None:
        """Check that the linears form one MLP, and that it has the channels."""
        names = (operation.reader, *operation.writers)
        if not operation.writers or len(set(names)) != len(names):
            raise PlanError(
                f"the plan narrows the MLP of {operation.reader}: expected other linears that "
                f"write its channels, each once, got {list(operation.writers)}"
            )
        for name in names:
            if name.rpartition(".")[0] != operation.mlp:
                raise PlanError(
                    f"the plan narrows {name}: it is not in the same module as {names[0]}"
                )
        num_channels = site.dense[operation.reader].columns
        for name in operation.writers:
            rows = site.dense[name].rows
            if rows % num_channels:
                raise PlanError(
                    f"the plan narrows {name}: its {rows} outputs are not a multiple of the "
                    f"{num_channels} channels that {operation.reader} reads"
                )
        check_kept(operation.channels, num_channels, "channels", operation.reader)

    def new_shapes(self, operation: NarrowMlp, dense: Shapes) -> dict[str, LinearShape]:
        """Return shapes with fewer rows, and for the reader with fewer columns."""
        num_channels, kept = dense[operation.reader].columns, len(operation.channels)
        shapes = {operation.reader: dense[operation.reader]._replace(columns=kept)}
        for writer in operation.writers:
            rows = dense[writer].rows // num_channels * kept
            shapes[writer] = dense[writer]._replace(rows=rows)
        return {name: shape._replace(is_narrowed=True) for name, shape in shapes.items()}

    def tensor_shapes(self, operation: NarrowMlp, dense: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the shape of the reader's weight."""
        reader = operation.reader
        return {f"{reader}.weight": (dense[reader].rows, len(operation.channels))}

    def apply(self, view: DecoderView, operation: NarrowMlp, tensors: Mapping[str, Tensor]) -> None:
        """Replace all linears of the MLP by narrowed ones."""
        reader = dense_module(view, operation.reader)
        num_channels = dense_shape(reader)[1]
        weight = like(tensors[f"{operation.reader}.weight"], reader.weight)
        set_narrowed(view, operation.reader, weight, whole_bias(reader))
        kept = torch.tensor(operation.channels)
        for writer in operation.writers:
            old = dense_module(view, writer)
            num_parts = dense_shape(old)[0] // num_channels
            rows = torch.cat([kept + part * num_channels for part in range(num_parts)])
            weight = kept_rows(old.weight, rows, is_transposed=isinstance(old, Conv1D))
            bias = None if old.bias is None else kept_rows(old.bias, rows)
            set_narrowed(view, writer, weight, bias)


def check_kept(kept: Sequence[int], number: int, noun: str, reader: str) -> None:
    """Check that units of a linear's input are kept in ascending order, some but not all.

    Raises:
        PlanError: If they are not.
    """
    if not 1 <= len(kept) < number:
        raise PlanError(
            f"the plan keeps {len(kept)} {noun} of {reader}: it must keep from 1 to {number - 1}"
        )
    if any(low >= high for low, high in pairwise(kept)):
        raise PlanError(f"the plan keeps {noun} of {reader} that are not in ascending order")
    if kept[0] < 0 or kept[-1] >= number:
        raise PlanError(
            f"{noun} of {reader} must be from 0 to {number - 1}, the plan keeps {kept[0]} to "
            f"{kept[-1]}"
        )


def set_narrowed(
    view: DecoderView, module: str, weight: nn.Parameter, bias: nn.Parameter | None
) -> NarrowedLinear:
    """Replace a linear by a narrowed one, and return that."""
    old = view.module(module)
    rows, columns = weight.shape
    new = NarrowedLinear(columns, rows, bias=bias is not None, device="meta")
    new.weight = weight
    new.register_parameter("bias", bias)
    shard_like(new, old)
    view.set_module(module, new.train(old.training))
    return new


def kept_rows(parameter: Tensor, rows: Tensor, *, is_transposed: bool = False) -> nn.Parameter:
    """Return rows of a weight or bias, or columns of a transposed weight, as a parameter."""
    tensor = whole(parameter.detach())
    tensor = tensor.mT if is_transposed else tensor
    kept = tensor[rows.to(tensor.device)].contiguous()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


register(Narrow())
