"""How decoder layers are called: inputs, outputs, and where these are no longer finite."""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.models.streamed import streamed_weights

logger = logging.getLogger(__name__)

_NUM_DIMENSIONS = (3, 4)  # of hidden states, with one stream or several


def hidden_input(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """Return the hidden states that a decoder layer was called with.

    They are ``(B, T, D)``, or ``(B, T, S, D)`` in families with S streams, such as DeepSeek-V4.
    """
    return _hidden(args[0] if args else kwargs.get("hidden_states"), "first argument")


def hidden_output(output: object) -> Tensor:
    """Return the hidden states in the output of a layer, bare or in a tuple, in the same shape."""
    return _hidden(output[0] if isinstance(output, tuple) else output, "layer output")


def _hidden(hidden: object, place: str) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"expected hidden states as {place}, got {type(hidden).__name__}: this family is not "
            "supported"
        )
    if hidden.ndim not in _NUM_DIMENSIONS:
        raise ModelError(
            f"the decoder layers pass on hidden states of shape {tuple(hidden.shape)}, expected "
            f"(windows, tokens, features): this family is not supported"
        )
    return hidden


def leave_uncalled(view: DecoderView) -> None:
    """Find the linears that cannot be measured, by a short pass, and leave them dense.

    Mamba, for example, uses the weight of a linear without calling it, and factors would save no
    time there. An indexer of sparse attention only chooses tokens, so no gradient reaches it.
    Processes that share a model must call this together.

    Raises:
        ModelError: If the model calls none of its linears.
    """
    names = [name for index in view.layer_indices for name in view.dense_modules(index)]
    probe = _Probe(view, names)
    uncalled = [name for name in names if probe.calls[name] != 1]
    found = {
        "does not call {} once per pass": uncalled,
        "does not use {} as linears": [n for n in names if n in probe.odd],
        "shares the weights of {} between layers": _sharing(view, names),
        "passes no gradient to {}": [n for n in names if n not in probe.with_gradient],
    }
    known: set[str] = set()
    for reason, left in found.items():
        new = [name for name in left if name not in known]
        known |= set(new)
        kinds = {name.removeprefix(f"{view.layers_name}.").partition(".")[2] for name in new}
        if kinds:
            logger.warning(
                "%s %s: these linears are left unchanged",
                type(view.model).__name__,
                reason.format(", ".join(sorted(kinds))),
            )
    view.leave_out(known)
    if len(uncalled) == len(names) > 0:
        raise ModelError(
            f"{type(view.model).__name__} calls none of its linears, so nothing can be measured"
        )


def _sharing(view: DecoderView, names: Sequence[str]) -> list[str]:
    """Return the linears whose weight another module holds, too, as the attention of Zamba."""
    named = view.model.named_parameters(remove_duplicate=False)
    holders = Counter(id(parameter) for _, parameter in named)
    return [name for name in names if holders[id(view.module(name).weight)] > 1]


class _Probe:
    """Runs two tokens forward and backward through a model, and watches linears by full name.

    Attributes:
        calls: How often each is called.
        odd: Those that read or write other features than their weight says, such as groups.
        with_gradient: Those that a gradient reaches.
    """

    def __init__(self, view: DecoderView, names: Sequence[str]) -> None:
        self.calls: Counter[str] = Counter()
        self.odd: set[str] = set()
        self.with_gradient: set[str] = set()
        self._family = type(view.model).__name__
        self._ids = torch.zeros((1, 2), dtype=torch.int64, device=view.model.device)
        with ExitStack() as stack:
            stack.enter_context(frozen(view.model))
            # Of sharded linears with biases; no model here changes such a view in place.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
            for index in view.layer_indices:
                handle = view.layer(index).register_forward_pre_hook(self._look, with_kwargs=True)
                stack.callback(handle.remove)
                if streamed_weights(view.model) is not None:
                    stack.callback(view.layer(index).register_forward_hook(_backward).remove)
            for name in names:
                module = view.module(name)
                handle = module.register_forward_hook(partial(self._count, name))
                stack.callback(handle.remove)
            embeddings = view.model.get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(_with_gradient).remove)
            stack.enter_context(torch.enable_grad())
            hidden: Tensor = view.model.base_model(input_ids=self._ids, use_cache=False)[0]
            if hidden.requires_grad:
                hidden.float().sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch

    def _look(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        number, expected = hidden_input(args, kwargs).shape[1], self._ids.shape[1]
        if number != expected:
            raise ModelError(
                f"the decoder layers of {self._family} get {number} hidden states for {expected} "
                "tokens, expected one per token: this family is not supported"
            )

    def _count(self, name: str, module: DenseModule, args: tuple[Tensor], output: Tensor) -> None:
        self.calls.update([name])
        if (output.shape[-1], args[0].shape[-1]) != dense_shape(module):
            self.odd.add(name)
        if output.requires_grad:
            hook = partial(self._note_gradient, name)
            output.register_hook(hook)  # type: ignore[no-untyped-call]  # untyped in torch

    def _note_gradient(self, name: str, _: Tensor) -> None:
        self.with_gradient.add(name)


def _backward(_module: nn.Module, _args: object, output: Any) -> Any:  # noqa: ANN401  of every family
    """Run backward through one layer at once: autograd would keep the weights of all of them."""
    hidden = hidden_output(output)
    if hidden.requires_grad:
        hidden.float().sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    following = hidden.detach().requires_grad_(True).clone()
    return following if isinstance(output, Tensor) else (following, *output[1:])


def _with_gradient(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    # A copy, since CTRL scales the embeddings in place.
    return output.detach().requires_grad_(True).clone()


def check_length(view: DecoderView, length: int, key: str) -> None:
    """Raise a ``ConfigError`` if windows, set by a key, are longer than the model has positions."""
    positions = getattr(view.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise ConfigError(f"{key} is {length}, but the model has {positions} positions")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model embeds."""
    embedding: Any = model.get_input_embeddings()  # Any: of every family
    rows = getattr(embedding, "num_embeddings", None)  # some rows may be factors
    return int(embedding.weight.shape[0] if rows is None else rows)


def check_vocabulary(view: DecoderView, input_ids: Tensor) -> None:
    """Raise a ``ModelError`` if a token id, of any non-empty shape, exceeds the embedding."""
    size = vocabulary_size(view.model)
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
