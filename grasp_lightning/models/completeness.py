"""Checks that a loaded model matches its checkpoint and its config."""

import copy
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError
from grasp_lightning.models.checkpoint import foreign_quantizer
from grasp_lightning.models.lowrank import is_replaced
from grasp_lightning.models.source import first_line

logger = logging.getLogger(__name__)

_MAX_NAMED = 3  # tensors named in one message
_LEAST_SHARE = 0.0005  # of the parameters, to be stated in a message
# Masks, positions and rotary tables that a model computes itself.
_COMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")

Shapes = Mapping[str, tuple[int, ...]]


def check_complete(name: str, report: Mapping[str, Any]) -> None:  # Any: mixed report
    """Raise a ``ModelError`` if the loading report of transformers names tensors not loaded."""
    mismatched = [
        f"{key} is {tuple(stored)}, expected {tuple(wanted)}"
        for key, stored, wanted in sorted(report["mismatched_keys"])
    ]
    problems = (
        ("lacks weights", sorted(report["missing_keys"])),
        ("has weights of another shape", mismatched),
        ("has weights that cannot be converted", [first_line(e) for e in report["error_msgs"]]),
    )
    for problem, names in problems:
        if names:
            raise ModelError(
                f"the checkpoint of {name} {problem}: {_some(names)}; it does not match its "
                "config.json"
            )


def check_config_builds(name: str, model: PreTrainedModel) -> None:
    """Refuse modules that the config does not build, such as adapters: they cannot be saved."""
    if foreign_quantizer(model) is not None:
        return
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        built = type(model)(copy.deepcopy(model.config))
    # Layers of some families share one activation.
    named = built.named_modules(remove_duplicate=False)
    expected = {path: type(module).__name__ for path, module in named}
    for path, module in _plain_modules(model, ""):
        found, wanted = type(module).__name__, expected.get(path, "nothing")
        if found != wanted:
            raise ModelError(
                f"{name} has {found} at {path}, where its config.json builds {wanted}: merge such "
                "additions into the weights, and save a plain model"
            )


def _plain_modules(module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
    if is_replaced(module):
        return
    yield path, module
    for child_name, child in module.named_children():
        yield from _plain_modules(child, f"{path}.{child_name}" if path else child_name)


def warn_of_rest(
    name: str,
    model: PreTrainedModel,
    architectures: Sequence[str] | None,
    unexpected: AbstractSet[str] = frozenset(),
    stored: Shapes | None = None,
) -> None:
    """Warn about the parts of a checkpoint that the loaded model does not have.

    Args:
        name: What messages call the model.
        model: The loaded model, or one on the meta device.
        architectures: Classes of the checkpoint, as its config.json names them.
        unexpected: Tensors that transformers found no place for.
        stored: Shapes in the weight files; None if they were not read.
    """
    stored = stored or {}
    rest = unexpected | _ignored(model, stored)
    share = _share(rest, stored)
    own, loaded = (architectures or [type(model).__name__])[0], type(model).__name__
    is_text_only = own.endswith(("ForCausalLM", "Model"))
    if own != loaded and (rest or not stored) and not is_text_only:
        parts = _some(_parts(rest, stored)) if rest else f"the other parts of a {own}"
        logger.warning(
            "%s is a %s, loaded as %s: the result is a text-only model without %s%s; all sizes "
            "and shares refer to the loaded part",
            name,
            own,
            loaded,
            parts,
            share,
        )
    elif rest:
        logger.warning(
            "the checkpoint of %s has weights that the model does not use: %s%s",
            name,
            _some(sorted(rest)),
            share,
        )


def _ignored(model: PreTrainedModel, stored: Shapes) -> set[str]:
    """Return the stored tensors that the class of a model silently ignores."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if not patterns:
        return set()
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    used = model.state_dict().keys()
    return {
        key
        for key in stored
        if ignored.search(key) and key not in used and not _COMPUTED.search(key)
    }


def _share(rest: AbstractSet[str], stored: Shapes) -> str:
    sizes = {key: math.prod(shape) for key, shape in stored.items()}
    # transformers may rename tensors before it reports them as unexpected.
    renamed = tuple(key for key in rest if key not in sizes)
    left = sum(
        size
        for key, size in sizes.items()
        if key in rest or any(key.endswith(other) or other.endswith(key) for other in renamed)
    )
    share = left / max(1, sum(sizes.values()))
    return f" ({share:.1%} of its parameters)" if share >= _LEAST_SHARE else ""


def _parts(rest: AbstractSet[str], stored: Shapes) -> list[str]:
    """Return the modules of which no tensor is used."""
    kept = {prefix for key in stored.keys() - rest for prefix in _prefixes(key)}
    return sorted({next((p for p in _prefixes(key) if p not in kept), key) for key in rest})


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
