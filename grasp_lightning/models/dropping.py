"""Which decoder layers can be dropped, tried on the meta device."""

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.numbering import unnumbered_settings
from grasp_lightning.models.rebuilding import rebuild_problem, rebuilt_empty
from grasp_lightning.models.source import first_line

_CACHES = ("past_key_values", "cache_params", "state")  # names of the cache in outputs
# Errors of a family's code that does not fit its own layers.
_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)

_droppable: WeakKeyDictionary[DecoderView, dict[tuple[int, ...], tuple[int, ...]]] = (
    WeakKeyDictionary()
)


def drop_problem(view: DecoderView, layers: Iterable[int]) -> str | None:
    """Return in one line why layers, by original number, cannot be dropped; None if they can.

    The config must build the remaining model. If a kind of layer disappears, such as the last
    attention of a hybrid, two steps with a cache must run on the meta device too, unless the family
    cannot run there at all. The model itself may be on the meta device.
    """
    trial = DecoderView(rebuilt_empty(view.model))
    kinds = _kinds(trial)
    gone = [view.layer_indices.index(index) for index in layers]
    try:
        trial.drop(gone)
        problem = rebuild_problem(trial.model)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        problem = f"its config cannot be shortened ({first_line(error)})"
    if problem is not None or len(set(_kinds(trial))) == len(set(kinds)):
        return problem
    obstacle = _error_with_cache(trial.model)
    if obstacle is None or _error_with_cache(rebuilt_empty(view.model)) is not None:
        return None
    lost = [i for i in layers if kinds[view.layer_indices.index(i)] not in _kinds(trial)]
    return (
        f"without layers {lost}, the last of their kind, {type(view.model).__name__} cannot "
        f"generate with its cache ({obstacle}); keep one of them"
    )


def droppable_layers(view: DecoderView, layers: Sequence[int]) -> tuple[int, ...]:
    """Return those of some layers, in ascending order, that may be dropped in any combination.

    If a kind of layer must not disappear, its last layer is left out. The model may be on the meta
    device.
    """
    key = (*view.layer_indices, -1, *layers)
    known = _droppable.setdefault(view, {})
    if key not in known:
        known[key] = _find_droppable(view, layers)
    return known[key]


def singly_droppable_layers(view: DecoderView, layers: Sequence[int]) -> tuple[int, ...]:
    """Return those of some layers that may be dropped, each alone."""
    if _are_alike(view):  # then one layer represents all
        return tuple(layers) if layers and drop_problem(view, layers[:1]) is None else ()
    return tuple(index for index in layers if drop_problem(view, [index]) is None)


def _find_droppable(view: DecoderView, layers: Sequence[int]) -> tuple[int, ...]:
    if _are_alike(view):
        return singly_droppable_layers(view, layers)
    found: list[int] = []
    for index in layers:
        if not any(drop_problem(view, trial) for trial in ([index], [*found, index])):
            found.append(index)
    return tuple(found)


def _kinds(view: DecoderView) -> list[tuple[object, ...]]:
    """Return the kind of each decoder layer: its entry in the config, and its modules."""
    config = view.model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [None] * len(view.layer_indices)
    modules = (
        ((name, type(module).__name__) for name, module in layer.named_modules())
        for layer in _layers(view)
    )
    return [(kind, *parts) for kind, parts in zip(types, modules, strict=True)]


def _are_alike(view: DecoderView) -> bool:
    """Return whether the decoder layers differ in weights and numbers only."""
    settings = [[unnumbered_settings(m) for m in layer.modules()] for layer in _layers(view)]
    shapes = [[parameter.shape for parameter in layer.parameters()] for layer in _layers(view)]
    alike = (_kinds(view), settings, shapes)
    return all(entry == entries[0] for entries in alike for entry in entries)


def _layers(view: DecoderView) -> list[nn.Module]:
    return [view.layer(index) for index in view.layer_indices]


def _error_with_cache(model: PreTrainedModel) -> str | None:
    """Return the error of two steps with a cache; None if they run."""
    tokens = torch.zeros((1, 4), dtype=torch.int64, device="meta")
    # bfloat16 is the only dtype with products of experts on the meta device.
    run: Any = model.to(torch.bfloat16)  # type: ignore[arg-type]  # Any: outputs of every family
    try:
        with torch.no_grad():
            outputs = run(input_ids=tokens, use_cache=True)
            caches = {name: getattr(outputs, name, None) for name in _CACHES}
            given = {name: cache for name, cache in caches.items() if cache is not None}
            run(input_ids=tokens[:, :1], use_cache=True, **given)
    except _ERRORS as error:
        return first_line(error)
    return None
