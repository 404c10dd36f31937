"""How decoder layers are called: what goes in, what comes out, and where it stops being finite."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from grasp_lightning import processes
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded

logger = logging.getLogger(__name__)

_NUM_DIMENSIONS = 3  # of hidden states


def hidden_input(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """Return the hidden states that a decoder layer was called with.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The hidden states, ``(B, T, D)``; those of other dimensions are a ``ModelError``.

    Raises:
        TypeError: If the layer was called in a way that no supported family uses.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise TypeError(f"expected hidden states as first argument, got {type(hidden).__name__}")
    _check_dimensions(hidden)
    return hidden


def hidden_output(output: object) -> Tensor:
    """Return the hidden states that a decoder layer gave back, bare or first in a tuple.

    Args:
        output: What the layer returned.

    Returns:
        The hidden states, ``(B, T, D)``; those of other dimensions are a ``ModelError``.

    Raises:
        TypeError: If there are none.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise TypeError(f"expected hidden states as layer output, got {type(hidden).__name__}")
    _check_dimensions(hidden)
    return hidden


def _check_dimensions(hidden: Tensor) -> None:
    if hidden.ndim != _NUM_DIMENSIONS:
        raise ModelError(
            f"the decoder layers pass on hidden states of shape {tuple(hidden.shape)}, expected "
            f"(windows, tokens, features): this family is not supported"
        )


def leave_uncalled(view: DecoderView) -> None:
    """Leave linears dense that the model does not call, by one short pass, and name them.

    Mamba multiplies by the weight of one of its linears itself. Nothing can be measured of such a
    linear, and as factors it would save no time. All processes that share a model must do so.

    Args:
        view: The model; what is left is no longer among its linears.

    Raises:
        ModelError: If the model calls none of its linears.
    """
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        del module
        hidden_input(args, kwargs)

    names = [name for index in view.layer_indices for name in view.dense_modules(index)]
    with ExitStack() as stack, torch.no_grad():
        for index in view.layer_indices:
            handle = view.layer(index).register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        for name in names:
            stack.callback(view.module(name).register_forward_hook(count(name)).remove)
        ids = torch.zeros((1, 2), dtype=torch.int64, device=view.model.device)
        view.model.base_model(input_ids=ids, use_cache=False)
    left = [name for name in names if calls[name] != 1]
    if left:
        view.leave_out(left)
        kinds = sorted(
            {name.removeprefix(f"{view.layers_name}.").partition(".")[2] for name in left}
        )
        logger.warning(
            "%s does not call %s once per pass: these linears stay as they are",
            type(view.model).__name__,
            ", ".join(kinds),
        )
    if len(left) == len(names) > 0:
        raise ModelError(
            f"{type(view.model).__name__} calls none of its linears, so none can be measured"
        )


def check_length(view: DecoderView, length: int, key: str) -> None:
    """Refuse windows that are longer than the model has positions.

    Args:
        view: The model.
        length: Most tokens of a window or sample.
        key: Its key in the configuration, for the message.

    Raises:
        ConfigError: If the windows are too long.
    """
    positions = getattr(view.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise ConfigError(f"{key} is {length}, but the model has {positions} positions")


def check_vocabulary(view: DecoderView, input_ids: Tensor) -> None:
    """Refuse a tokenizer that gives ids which the model does not know.

    Args:
        view: The model.
        input_ids: Token ids, any shape, not empty.

    Raises:
        ModelError: If an id is beyond the embedding.
    """
    weight = view.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)  # every family embeds its tokens
    size = weight.shape[0]
    largest = int(input_ids.max())
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model knows {size} tokens: they do not "
            "belong together"
        )


def find_non_finite(view: DecoderView, inputs: Mapping[str, Tensor], losses: Tensor) -> str | None:
    """Return in words where a forward pass first gave NaN or infinity, None if it did not.

    Processes that share a sharded model must all ask after each pass: it takes all of them to run
    the model once more, and they get one answer.

    Args:
        view: The model.
        inputs: Keyword arguments of the pass.
        losses: What followed from its output.

    Returns:
        As ``locate_non_finite``.
    """
    is_bad = not bool(losses.isfinite().all())
    if not is_sharded(view.model):
        return locate_non_finite(view, inputs) if is_bad else None
    if not any(processes.gather(is_bad)):
        return None
    where = locate_non_finite(view, inputs)
    return next(found for found in processes.gather(where if is_bad else None) if found)


def locate_non_finite(view: DecoderView, inputs: Mapping[str, Tensor]) -> str:
    """Return in words where a forward pass first gives NaN or infinity.

    Args:
        view: The model.
        inputs: Keyword arguments with which the model gave NaN or infinity.

    Returns:
        The first decoder layer whose output is not finite, or the language-model head.
    """
    bad: list[int] = []
    with ExitStack() as stack, torch.no_grad():
        for index in view.layer_indices:
            hook = _NoteNonFinite(index, bad)
            stack.callback(view.layer(index).register_forward_hook(hook).remove)
        view.model(**inputs, use_cache=False)
    return f"the output of decoder layer {bad[0]}" if bad else "the language-model head"


class _NoteNonFinite:
    """Forward hook that notes a layer whose output holds NaN or infinity."""

    def __init__(self, index: int, bad: list[int]) -> None:
        self._index = index
        self._bad = bad

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        del module, args
        if not hidden_output(output).isfinite().all():
            self._bad.append(self._index)
