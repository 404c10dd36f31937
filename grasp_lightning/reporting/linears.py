"""What plan and scores say about each replaced linear."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from grasp_lightning.models.linears import in_attention
from grasp_lightning.plan import FactorizeLinear, Plan, RemoveExperts
from grasp_lightning.reporting.metrics import LayerChange, LinearCount

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class ScoredLinear(NamedTuple):
    """A replaced linear with its kept components, scores ``(K,)`` and singular values ``(K,)``."""

    module: str
    components: tuple[int, ...]
    scores: Array
    singular_values: Array

    @property
    def layer(self) -> int:
        """Index of its decoder layer."""
        return module_place(self.module)[0]

    @property
    def kind(self) -> str:
        """Name inside the layer, such as ``mlp.gate_proj``."""
        return module_place(self.module)[1]

    @property
    def num_beyond_largest(self) -> int:
        """Number of kept components that truncation to the same rank would remove."""
        return sum(index >= len(self.components) for index in self.components)

    @property
    def kept_score(self) -> float:
        """Share of the total score in the kept components, in [0, 1]."""
        return self._kept_share(self.scores)

    @property
    def kept_energy(self) -> float:
        """Share of the squared Frobenius norm in the kept components, in [0, 1]."""
        return self._kept_share(self.singular_values**2)

    def _kept_share(self, values: Array) -> float:
        total = float(values.sum())
        return float(values[list(self.components)].sum()) / total if total > 0 else 0.0


def scored_linears(plan: Plan, scores: Mapping[str, Tensor]) -> tuple[ScoredLinear, ...]:
    """Return the linears with scores and singular values, each ``(K,)``, in plan order."""
    return tuple(
        ScoredLinear(
            module=operation.module,
            components=operation.components,
            scores=float64_array(scores[f"{operation.module}.scores"]),
            singular_values=float64_array(scores[f"{operation.module}.singular_values"]),
        )
        for operation in plan.operations
        if isinstance(operation, FactorizeLinear)
        and operation.components
        and f"{operation.module}.scores" in scores
        and f"{operation.module}.singular_values" in scores
    )


def predicted_losses(plan: Plan, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the predicted loss of each cut linear and each removed part, in nats per token.

    Linears come in the order of the plan, then groups of rows of embedding and head, then removed
    layers and blocks with their measured price.
    Empty if the method predicts no losses. ``scores`` has ``<module>.scores``, descending: the loss
    of dropping each component ``(K,)``, or each channel ``(I,)`` of the linear that reads them. The
    shape is ``(E, I)`` for experts: each has its own channels.
    """
    if plan.options.get("weighting") != "kfac":
        return {}
    cut = {
        module: float(scores[f"{module}.scores"][..., kept:].double().sum())
        for module, kept in (plan.ranks | plan.channels | plan.row_ranks).items()
        if f"{module}.scores" in scores
    }
    for op in (op for op in plan.operations if isinstance(op, RemoveExperts)):
        values = scores.get(f"{op.experts}.scores")
        if values is not None:
            width = plan.channels.get(op.experts, values.shape[-1])
            removed = sorted({*range(len(values))} - {*op.kept})
            whole = float(values[removed, :width].double().sum())
            cut[op.experts] = cut.get(op.experts, 0.0) + whole
    return cut | removed_parts(plan, scores)


def removed_parts(plan: Plan, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the measured price of each removed layer and block by name, sorted by layer."""
    found = {}
    for key, price in scores.items():
        name, _, kind = key.rpartition(".")
        layer, part = module_place(name)
        is_gone = name in plan.removed_blocks or (part == "layer" and layer in plan.dropped_layers)
        if kind == "removal" and is_gone:
            found[name] = float(price)
    return {name: found[name] for name in sorted(found, key=module_place)}


def layer_changes(plan: Plan, linears: Collection[str]) -> dict[str, LayerChange | None]:
    """Return the changed decoder layers by index, ascending; None for a deleted one.

    ``linears`` are the full names of all linears in the decoder layers of the original model.
    """
    changed = {module for op in plan.operations for module in op.modules}
    changed |= {op.experts for op in plan.operations if isinstance(op, RemoveExperts)}
    changed |= {module for module in linears if module_place(module)[0] in plan.merged_layers}
    counts: dict[int, dict[bool, list[bool]]] = {}
    for name in linears:
        layer, kind = module_place(name)
        parts = counts.setdefault(layer, {True: [], False: []})
        parts[in_attention(kind)].append(name in changed)
    changes: dict[int, LayerChange | None] = dict.fromkeys(plan.dropped_layers)
    for layer, parts in counts.items():
        if layer not in changes and any(map(any, parts.values())):
            sizes = {k: LinearCount(changed=sum(v), total=len(v)) for k, v in parts.items()}
            changes[layer] = LayerChange(attention=sizes[True], mlp=sizes[False])
    return {str(layer): changes[layer] for layer in sorted(changes)}


def module_place(module: str) -> tuple[int, str]:
    """Return layer and kind of a linear: ``(22, "mlp.gate_proj")``; layer -1 if it is in none."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", module)
    return (int(match[1]), match[2]) if match else (-1, module)


def float64_array(tensor: Tensor) -> Array:
    """Return the values of a tensor as float64 on the host."""
    return tensor.detach().cpu().double().numpy()
