"""How decoder layers are called: inputs, outputs, and where these are no longer finite."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from grasp_lightning import processes
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded

logger = logging.getLogger(__name__)

_NUM_DIMENSIONS = 3  # of hidden states


def hidden_input(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """Return the hidden states, ``(B, T, D)``, that a decoder layer was called with."""
    return _hidden(args[0] if args else kwargs.get("hidden_states"), "first argument")


def hidden_output(output: object) -> Tensor:
    """Return the hidden states, ``(B, T, D)``, in the output of a layer, bare or in a tuple."""
    return _hidden(output[0] if isinstance(output, tuple) else output, "layer output")


def _hidden(hidden: object, place: str) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise TypeError(f"expected hidden states as {place}, got {type(hidden).__name__}")
    if hidden.ndim != _NUM_DIMENSIONS:
        raise ModelError(
            f"the decoder layers pass on hidden states of shape {tuple(hidden.shape)}, expected "
            f"(windows, tokens, features): this family is not supported"
        )
    return hidden


def leave_uncalled(view: DecoderView) -> None:
    """Find the linears that the model does not call, by a short pass, and leave them dense.

    Mamba, for example, uses the weight of a linear without calling it: nothing can be measured
    there, and factors would save no time. Processes that share a model must call this together.

    Raises:
        ModelError: If the model calls none of its linears.
    """
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    def look(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
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
            "%s does not call %s once per pass: these linears are left unchanged",
            type(view.model).__name__,
            ", ".join(kinds),
        )
    if len(left) == len(names) > 0:
        raise ModelError(
            f"{type(view.model).__name__} calls none of its linears, so nothing can be measured"
        )


def check_length(view: DecoderView, length: int, key: str) -> None:
    """Raise a ``ConfigError`` if windows, set by a key, are longer than the model has positions."""
    positions = getattr(view.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise ConfigError(f"{key} is {length}, but the model has {positions} positions")


def check_vocabulary(view: DecoderView, input_ids: Tensor) -> None:
    """Raise a ``ModelError`` if a token id, of any non-empty shape, exceeds the embedding."""
    weight = view.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)  # every family embeds its tokens
    size = weight.shape[0]
    largest = int(input_ids.max())
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives token {largest}, but the model has only {size} tokens: they do "
            "not belong together"
        )


def find_non_finite(view: DecoderView, inputs: Mapping[str, Tensor], losses: Tensor) -> str | None:
    """Return in words where a pass with given losses first gave NaN or infinity; None if nowhere.

    Processes that share a sharded model must all call this after each pass, since it may run the
    model again. They get the same answer.
    """
    is_bad = not bool(losses.isfinite().all())
    if not is_sharded(view.model):
        return locate_non_finite(view, inputs) if is_bad else None
    if not any(processes.gather(is_bad)):
        return None
    where = locate_non_finite(view, inputs)
    return next(found for found in processes.gather(where if is_bad else None) if found)


def locate_non_finite(view: DecoderView, inputs: Mapping[str, Tensor]) -> str:
    """Return in words where a pass first gives NaN or infinity: a layer, or else the head."""
    bad: list[int] = []

    def note(index: int, _module: nn.Module, _args: object, output: object) -> None:
        if not hidden_output(output).isfinite().all():
            bad.append(index)

    with ExitStack() as stack, torch.no_grad():
        for index in view.layer_indices:
            handle = view.layer(index).register_forward_hook(partial(note, index))
            stack.callback(handle.remove)
        view.model(**inputs, use_cache=False)
    return f"the output of decoder layer {bad[0]}" if bad else "the language-model head"
