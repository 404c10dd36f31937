"""Decoder layers merged into one: its weights, and a trial that leaves the model as it was.

Source: Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse", arXiv:2402.11187.

Legend: theta_0 are the weights of the layer that remains, theta_1 to theta_m those of the layers
that follow it and are merged into it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import unlike_layers
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.sharding import own_part
from grasp_lightning.plan import MergeLayers


def merge_problem(view: DecoderView) -> str | None:
    """Return in one line why the decoder layers cannot be merged; None if they can.

    All must have one kind and shape, and be dense and without experts: the experts of one layer do
    not correspond to the experts of another. The weights may be on the meta device.
    """
    for index in view.layer_indices:
        if view.skipped(index):
            return f"layer {index} is a mixture of experts"
        if has_replaced(view.layer(index)):
            return f"layer {index} has low-rank or narrowed linears"
    unlike = unlike_layers(view)
    if unlike is None:
        return None
    return f"layers {unlike[0]} and {unlike[1]} differ in kind or shape"


def merge_weights(view: DecoderView, operation: MergeLayers) -> None:
    """Give the base layer its merged weights, in place; the absorbed layers stay in the model.

    ``paper``: ``theta_0 + sum_k (theta_k - theta_0)`` for every parameter of the layer, norms and
    biases included. The sum is in float32 or better.

    ``released``: the public code subtracts the weight that it has just updated, so its sum
    telescopes: every linear, with its bias, becomes that of the last absorbed layer. Norms and all
    other parameters of the base stay.

    All layers must have one kind and shape. Each process merges its own shards.
    """
    for weight, merged in _merged_weights(view, operation):
        weight.copy_(merged)


@contextmanager
def merged_for_a_trial(view: DecoderView, operation: MergeLayers) -> Iterator[None]:
    """Merge weights during a ``with`` block, and restore them to the bit."""
    changes = list(_merged_weights(view, operation))
    before = [(weight, weight.clone()) for weight, _ in changes]
    try:
        for weight, merged in changes:
            weight.copy_(merged)
        yield
    finally:
        for weight, original in before:
            weight.copy_(original)


def _merged_weights(view: DecoderView, operation: MergeLayers) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each weight of the base layer that changes, and its new values."""
    if not operation.absorbed:
        return
    base, *others = [_weights(view, index) for index in (operation.base, *operation.absorbed)]
    if operation.rule == "paper":
        for name, weight in base.items():
            yield weight, _sum_of_differences(weight, [other[name] for other in others])
        return
    for module_name, module in view.layer(operation.base).named_modules():
        if isinstance(module, DenseModule):
            for name, _ in module.named_parameters(module_name, recurse=False):
                yield base[name], others[-1][name]


def _weights(view: DecoderView, index: int) -> dict[str, Tensor]:
    return {name: own_part(weight) for name, weight in view.layer(index).named_parameters()}


def _sum_of_differences(base: Tensor, others: Sequence[Tensor]) -> Tensor:
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    total = wide.clone()
    for other in others:
        total += other.to(wide.dtype) - wide
    return total.to(base.dtype)
