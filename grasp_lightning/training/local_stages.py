"""Which layers a layer-local training trains together, and what they learn to compute."""

from typing import NamedTuple

from grasp_lightning.errors import ModelError
from grasp_lightning.plan import AddSeam, Plan


class LocalStage(NamedTuple):
    """Contiguous layers of the compressed model that are trained together.

    Attributes:
        first: The first of them.
        last: The last of them.
        dense_first: The first layer of the dense model that they stand for.
        dense_last: The last one, whose output they learn.
    """

    first: int
    last: int
    dense_first: int
    dense_last: int


def local_stages(
    num_layers: int, num_dense: int, plan: Plan | None, layers_at_once: int
) -> list[LocalStage]:
    """Return the stages of a layer-local training, from the bottom.

    A layer stands for itself and for the deleted layers above it, up to the next remaining one. If
    that one holds a seam for them, the seam stands for them, so the layer stands for itself.

    Args:
        num_layers: Number of decoder layers of the compressed model.
        num_dense: Number of decoder layers of the dense model.
        plan: The plan that deleted layers; None if it is unknown.
        layers_at_once: Number of layers that are trained together.

    Raises:
        ModelError: If the numbers of layers do not fit together.
    """
    operations = () if plan is None else plan.operations
    gone = {index for operation in operations for index in operation.dropped}
    if num_layers + len(gone) != num_dense:
        raise ModelError(
            f"objective: local cannot match the {num_layers} decoder layers of the model to the "
            f"{num_dense} of distillation.teacher: the plan.json beside the model's folder "
            f"{'is missing' if plan is None else f'deletes {len(gone)}'}; use the dense model that "
            "was compressed, and the model/ folder of its run"
        )
    held = {
        index
        for operation in operations
        if isinstance(operation, AddSeam) and not operation.is_after
        for index in operation.layers
    }
    kept = [index for index in range(num_dense) if index not in gone]
    ends = []
    for index, following in zip(kept, [*kept[1:], num_dense], strict=True):
        between = [layer for layer in range(index + 1, following) if layer not in held]
        ends.append(max(between, default=index))
    stages = []
    for first in range(0, num_layers, layers_at_once):
        last = min(first + layers_at_once, num_layers) - 1
        stages.append(LocalStage(first, last, ends[first - 1] + 1 if first else 0, ends[last]))
    return stages
