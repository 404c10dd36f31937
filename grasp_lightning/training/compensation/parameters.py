"""Which weights a compensation trains when it trains weights themselves, not adapters."""

from collections.abc import Callable, Collection, Iterator
from typing import Literal

from torch import nn

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import is_replaced, ranks_of
from grasp_lightning.plan import MergeLayers, Plan, SetWeights


def own_parameters(
    view: DecoderView, train: Literal["replaced", "all"], rewritten: Collection[str]
) -> dict[str, nn.Parameter]:
    """Return the parameters of decoder layers that a training mode trains, in model order.

    ``replaced``: weights and biases of low-rank and narrowed linears, seams, narrowed experts, and
    ``rewritten`` parameters. ``all``: every parameter of the decoder layers. Embeddings, the last
    norm and the head are in neither.

    Args:
        view: The model.
        train: The training mode.
        rewritten: Names from ``rewritten_parameters``.

    Raises:
        ModelError: If there is nothing to train.
    """
    found = {
        name: parameter
        for index in view.layer_indices
        for name, parameter in _parameters_of(view, f"{view.layers_name}.{index}")
    }
    if train == "all":
        return found
    replaced = {
        f"{module}.{name}"
        for module, part in view.model.named_modules()
        if is_replaced(part)
        for name, _ in part.named_parameters()
    }
    found = {name: p for name, p in found.items() if name in replaced or name in rewritten}
    if not found:
        raise ModelError(
            "train: replaced needs a model with low-rank or narrowed linears, seams, or weights "
            "that the plan.json beside its folder names, and this one has none: give the model/ "
            "folder of a run of compress, or use train: all"
        )
    return found


def rewritten_parameters(view: DecoderView, plan: Plan) -> frozenset[str]:
    """Return the present names of the parameters to which a plan gave new values of equal shape.

    Args:
        view: The compressed model, as loaded.
        plan: The plan that it was compressed with.

    Raises:
        ModelError: If the plan belongs to another model.
    """
    renamed = _renaming(view, plan)
    ranks = {renamed(module): rank for module, rank in plan.ranks.items()}
    if not ranks.items() <= ranks_of(view.model).items():
        raise ModelError(
            "the plan.json beside the model's folder belongs to another model: its low-rank "
            "linears differ; move the model's folder, or use train: all"
        )
    found: set[str] = set()
    for operation in plan.operations:
        if isinstance(operation, SetWeights):
            found |= {renamed(f"{operation.module}.{name}") for name in operation.parameters}
        elif isinstance(operation, MergeLayers) and operation.absorbed:
            layer = renamed(f"{view.layers_name}.{operation.base}")
            found |= {name for name, _ in _parameters_of(view, layer)}
    return frozenset(found)


def _renaming(view: DecoderView, plan: Plan) -> Callable[[str], str]:
    """Return a function from a name in the original model to the present one."""
    total = len(view.layer_indices) + len(plan.dropped_layers)
    left = [index for index in range(total) if index not in plan.dropped_layers]
    positions = {str(old): str(new) for new, old in enumerate(left)}

    def renamed(name: str) -> str:
        number, dot, rest = name.removeprefix(f"{view.layers_name}.").partition(".")
        # A layer that was deleted later keeps a name that the model does not have.
        return f"{view.layers_name}.{positions.get(number, f'({number})')}{dot}{rest}"

    return renamed


def _parameters_of(view: DecoderView, module: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module by full name; none if it does not exist."""
    prefix = f"{module}."
    return ((name, p) for name, p in view.model.named_parameters() if name.startswith(prefix))
