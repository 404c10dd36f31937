"""What a model with sliced hidden states has instead of its norms and residual connections.

This file needs only torch: its text is copied into every saved model, like that of ``lowrank.py``.

Legend: D hidden size of the original model, d number of kept directions.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

# Keys of ``stream_settings``, and the types of their values.
WIDTH, SIZE, EMBEDDINGS, NORMS = "width", "size", "embeddings", "norms"
SHORTCUTS, BIASES, HEAD = "shortcuts", "biases", "head"
_TYPES: dict[str, Any] = {
    WIDTH: int,
    SIZE: int,
    EMBEDDINGS: list,
    NORMS: dict,
    SHORTCUTS: dict,
    BIASES: list,
    HEAD: str | NoneType,
}
_MARK = "grasp_sliced"  # an attribute of narrower embeddings, and of linears with a new bias


class SlicedNorm(nn.Module):
    """``x / sqrt(sum(x^2) / width + eps)``: an RMS norm over the kept directions, without a gain.

    ``width`` is D: what was removed counts as zero. Gain, bias and mean of the original norm are in
    the linears around it.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Return normed hidden states, ``(..., d)``, computed in float32 or better."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        square = wide.square().sum(dim=-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(square + self.eps)).to(hidden.dtype)


class ShortcutLinear(nn.Linear):
    """A square linear without bias, which turns hidden states from one basis into the next.

    It reads what enters a norm. Its output is added to that of a linear which writes to the hidden
    states: the residual connection then adds both to its input. The difference from the identity is
    stored.

    Attributes:
        norm: Name of the norm in the module that holds the shortcut.
        writer: Name of the linear in that module.
        entering: What the norm read last, until the linear has written.
    """

    norm: str
    writer: str
    entering: Tensor | None = None


def set_shortcut(
    model: nn.Module, name: str, shortcut: ShortcutLinear, norm: str, writer: str
) -> None:
    """Put a shortcut into a model and let the model use it.

    Args:
        model: A model whose ``norm`` and ``writer`` are sliced already.
        name: Full name of the shortcut, in a module that holds both.
        shortcut: The linear.
        norm: Full name of the norm whose input it reads.
        writer: Full name of the linear whose output it adds to.
    """
    parent, _, own = name.rpartition(".")
    shortcut.norm, shortcut.writer = (end.removeprefix(f"{parent}.") for end in (norm, writer))
    holder = model.get_submodule(parent)
    holder.add_module(own, shortcut)
    # Partials: a copy of the model then uses its own shortcut.
    reading = holder.get_submodule(shortcut.norm)
    reading.register_forward_pre_hook(partial(_note, shortcut))
    writing = holder.get_submodule(shortcut.writer)
    writing.register_forward_hook(partial(_add, shortcut))


def _note(shortcut: ShortcutLinear, _: nn.Module, args: tuple[Any, ...]) -> None:
    shortcut.entering = args[0]


def _add(shortcut: ShortcutLinear, _: nn.Module, _args: object, output: Tensor) -> Tensor:
    entering, shortcut.entering = shortcut.entering, None
    assert entering is not None  # the norm runs before the linear
    return output + cast(Tensor, shortcut(entering.to(output.device)))


def shortcut_name(norm: str, writer: str) -> str:
    """Return the full name of a shortcut: it is in the module that holds its norm and linear."""
    shared = len([a for a, b in zip(norm.split("."), writer.split("."), strict=False) if a == b])
    parts = norm.split(".")
    return ".".join([*parts[:shared], f"{'_'.join(parts[shared:])}_shortcut"])


def is_sliced_norm(module: nn.Module) -> bool:
    """Return whether a module is a ``SlicedNorm``, of this file or of a copy of it."""
    return type(module).__name__ == SlicedNorm.__name__


def is_shortcut(module: nn.Module) -> bool:
    """Return whether a module is a ``ShortcutLinear``, of this file or of a copy of it."""
    # By name; FSDP2 creates a subclass for every module that it shards.
    return any(base.__name__ == ShortcutLinear.__name__ for base in type(module).__mro__)


def is_sliced(model: nn.Module) -> bool:
    """Return whether the hidden states of a model are sliced."""
    return any(is_sliced_norm(module) for module in model.modules())


def shortcuts(model: nn.Module) -> dict[str, ShortcutLinear]:
    """Return the shortcuts of a model by full name, sorted by name."""
    found = {name: module for name, module in model.named_modules() if is_shortcut(module)}
    return {name: cast(ShortcutLinear, found[name]) for name in sorted(found)}


def slice_embedding(embedding: nn.Embedding, weight: nn.Parameter) -> None:
    """Give an embedding a weight with fewer columns, ``(V, d)``; its class stays."""
    embedding.weight = weight
    embedding.embedding_dim = weight.shape[1]
    setattr(embedding, _MARK, True)


def give_bias(linear: nn.Linear, bias: nn.Parameter) -> None:
    """Give a linear of a sliced model the bias that its original did not have."""
    linear.bias = bias
    setattr(linear, _MARK, True)


def stream_settings(model: nn.Module) -> dict[str, Any]:  # Any: values of JSON
    """Return what slicing changed in a model besides shapes of linears; empty if it is not sliced.

    - ``width``, ``size``: D and d.
    - ``embeddings``: full names of the narrower ones.
    - ``norms``: eps of each norm.
    - ``shortcuts``: of each the norm whose input it reads, and the linear whose output it adds to.
    - ``biases``: linears that had no bias before.
    - ``head``: the linear that a model without its head lacks.
    """
    modules = dict(model.named_modules())
    norms = {name: cast(Any, m) for name, m in sorted(modules.items()) if is_sliced_norm(m)}
    if not norms:
        return {}
    marked = {name: m for name, m in sorted(modules.items()) if hasattr(m, _MARK)}
    embeddings = {name: m for name, m in marked.items() if isinstance(m, nn.Embedding)}
    ends = {
        name: [f"{name.rpartition('.')[0]}.{end}" for end in (shortcut.norm, shortcut.writer)]
        for name, shortcut in shortcuts(model).items()
    }
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)  # Any: of every family
    head = get_head()
    return {
        WIDTH: next(iter(norms.values())).width,
        SIZE: next(iter(embeddings.values())).embedding_dim,
        EMBEDDINGS: [*embeddings],
        NORMS: {name: norm.eps for name, norm in norms.items()},
        SHORTCUTS: ends,
        BIASES: [name for name in marked if name not in embeddings],
        HEAD: next((name for name, module in modules.items() if module is head), None),
    }


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:  # Any: values of JSON
    """Return the settings of ``stream_settings`` with their keys and types checked.

    Raises:
        ValueError: If one is missing, unknown or of another type.
    """
    if settings and settings.keys() != _TYPES.keys():
        raise ValueError(f"stream must have the keys {sorted(_TYPES)}, got {sorted(settings)}")
    for key, value in settings.items():
        if not isinstance(value, _TYPES[key]) or (key in (WIDTH, SIZE) and value < 1):
            raise ValueError(f"{key} of stream has a wrong value: {value!r}")
    for name, ends in settings.get(SHORTCUTS, {}).items():
        if [*map(type, ends)] != [str, str] or name != shortcut_name(*ends):
            raise ValueError(f"shortcut {name} of stream does not belong to {ends!r}")
    return dict(settings)


def slice_modules(
    model: nn.Module,
    settings: Mapping[str, Any],  # Any: values of JSON
    find: Callable[[str], str],
) -> None:
    """Change all that slicing changes but linears, in a model on the meta device.

    Args:
        model: The model, with its narrowed linears.
        settings: Those of ``stream_settings``.
        find: Maps a name in the settings to the name in the model.

    Raises:
        ValueError: If the model does not have such embeddings.
    """
    if not settings:
        return
    size = settings[SIZE]
    for name in settings[EMBEDDINGS]:
        embedding = model.get_submodule(find(name))
        if not isinstance(embedding, nn.Embedding) or embedding.embedding_dim < size:
            raise ValueError(f"{name} cannot become an embedding of size {size}")
        weight = embedding.weight.new_empty((embedding.num_embeddings, size))
        slice_embedding(embedding, nn.Parameter(weight))
        dtype = weight.dtype
    for name, eps in settings[NORMS].items():
        replaced = find(name)
        parent, _, own = replaced.rpartition(".")
        model.get_submodule(parent).add_module(own, SlicedNorm(settings[WIDTH], eps))
    for norm, writer in settings[SHORTCUTS].values():
        ends = find(norm), find(writer)
        shortcut = ShortcutLinear(size, size, bias=False, device="meta", dtype=dtype)
        set_shortcut(model, shortcut_name(*ends), shortcut, *ends)
    for name in settings[BIASES]:
        if name != settings[HEAD] or name in dict(model.named_modules()):
            setattr(model.get_submodule(find(name)), _MARK, True)


def sliced_problem(model: nn.Module) -> str | None:
    """Return why a sliced model cannot be saved: programs without this format would open it."""
    settings = stream_settings(model)
    if not settings or settings[SIZE] < settings[WIDTH]:
        return None
    return f"all {settings[WIDTH]} directions of the hidden states are kept, which saves nothing"
