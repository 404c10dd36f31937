"""Hidden states kept between passes, so that only the upper part of a model runs again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView

_TOLERANCE = 1e-2  # of two runs of one layer on the same numbers, in any dtype
DEFAULT_LIMIT = 2 * 1024**3  # bytes


class HiddenCache:
    """What enters some decoder layers, for every window, as long as nothing below them changes.

    The first pass fills it. A later pass that measures layer l or higher starts from the highest
    cached layer that is not above l: the layers below hand their input through. Sums come out bit-
    equal, since the same numbers enter the same layers.

    Args:
        view: The model.
        limit: Bytes that the cache may take; the lowest layers that do not fit are left out.
    """

    def __init__(self, view: DecoderView, limit: int = DEFAULT_LIMIT) -> None:
        self._view = view
        self._limit = limit
        self._hidden: dict[int, dict[int, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self._index: list[int] = []

    def start_batch(self, index: Tensor) -> None:
        """Tell which windows the coming forward pass has.

        Args:
            index: Positions of the windows, ``(B,)``; empty for padding.
        """
        self._index = index.tolist()

    def start_layer(self, measured: int, windows: Sequence[int]) -> int | None:
        """Return the layer that a pass over some windows can start from.

        Args:
            measured: Lowest layer that the pass measures.
            windows: Windows that the pass goes over.

        Returns:
            The highest cached layer that is not above ``measured``; None if there is none.
        """
        usable = [
            layer
            for layer, hidden in self._hidden.items()
            if layer <= measured and hidden.keys() >= set(windows)
        ]
        return max(usable, default=None)

    def keep_only(self, layers: Sequence[int]) -> None:
        """Drop what is cached of other layers.

        Args:
            layers: Layers that are still of use.
        """
        self._hidden = {layer: self._hidden[layer] for layer in self._hidden if layer in layers}

    @contextmanager
    def capturing(self, layers: Sequence[int], num_windows: int) -> Iterator[None]:
        """Fill the cache during the forward passes of a ``with`` block.

        Args:
            layers: Layers whose input is kept, ascending.
            num_windows: Windows that the passes go over: a layer is kept whole or not at all.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for index in self._view.layer_indices:
                layer = self._view.layer(index)
                if index in layers:
                    above = len(layers) - 1 - layers.index(index)
                    hook = self._keep_input(index, num_windows, above)
                    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
                stack.callback(layer.register_forward_hook(self._note_output(index)).remove)
            yield

    @contextmanager
    def skipping(self, index: int) -> Iterator[None]:
        """Let one layer hand its input through; ``capturing`` must have been around a pass before.

        Args:
            index: Its number in the original model.

        Yields:
            Nothing.
        """
        with handing_through(self._view.layer(index), self._lengths[index]):
            yield

    @contextmanager
    def starting_from(self, start: int | None) -> Iterator[None]:
        """Let the layers below one hand their input through, and that one take its cached input.

        Args:
            start: What ``start_layer`` returned; of None, all layers run.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            if start is None:
                yield
                return
            for index in self._view.layer_indices:
                if index < start:
                    stack.enter_context(self.skipping(index))
            first = self._view.layer(start)
            # Before every other hook: an observer may cut the graph at this very layer.
            handle = first.register_forward_pre_hook(
                self._take_cached(start), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
            yield

    def _keep_input(self, index: int, num_windows: int, above: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            del module
            if not self._index:  # padding
                return
            hidden = hidden_input(args, kwargs).detach()
            # All layers have inputs of one size, and the higher ones save more of a pass.
            if hidden[0].nbytes * num_windows * (above + 1) <= self._limit:
                rows = self._hidden.setdefault(index, {})
                rows.update(zip(self._index, hidden.clone().unbind(), strict=True))

        return keep

    def _note_output(self, index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: object, output: object) -> None:
            del module, args
            # 0 stands for a bare tensor.
            self._lengths[index] = len(output) if isinstance(output, tuple) else 0

        return note

    def _take_cached(
        self, index: int
    ) -> Callable[..., tuple[tuple[object, ...], dict[str, object]]]:
        def take(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            del module
            if not self._index:  # padding counts nothing, so what was handed through will do
                return args, kwargs
            hidden = torch.stack([self._hidden[index][window] for window in self._index])
            return with_hidden(hidden, args, kwargs)

        return take


def with_hidden(
    hidden: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a decoder layer's call with other hidden states.

    Args:
        hidden: The hidden states, ``(B, T, D)``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        Positional and keyword arguments.
    """
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}


def check_independent(view: DecoderView, method: MethodConfig) -> None:
    """Refuse what runs decoder layers one by one, if the model's layers need more of each other.

    Args:
        view: The model.
        method: What the user set.

    Raises:
        ModelError: If layers hand on more than hidden states, such as keys and values.
    """
    keys = [key for key in ("refit", "removable") if getattr(method, key) not in {None, "none"}]
    if keys and not pass_on_hidden_states_only(view):
        raise ModelError(
            f"decoder layers of {type(view.model).__name__} hand on more than hidden states, such "
            f"as keys and values, so they cannot be run one by one: set "
            f"{' and '.join(f'method.{key}: none' for key in keys)}"
        )


@torch.no_grad()
def pass_on_hidden_states_only(view: DecoderView) -> bool:
    """Return whether each decoder layer gives the same where the others only hand their input on.

    It does not where a layer reads keys and values that an earlier one has computed. Two tokens are
    run through every layer alone. All processes that share a model must ask.

    Args:
        view: The model.

    Returns:
        True if layers may be run one by one.
    """
    ids = torch.zeros((1, 2), dtype=torch.int64, device=view.model.device)
    seen: dict[int, tuple[Tensor, Tensor, int]] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: object) -> None:  # noqa: ANN401  of every family
            length = len(output) if isinstance(output, tuple) else 0
            seen[index] = (hidden_input(args, kwargs), hidden_output(output), length)

        return hook

    with ExitStack() as stack:
        for index in view.layer_indices:
            handle = view.layer(index).register_forward_hook(note(index), with_kwargs=True)
            stack.callback(handle.remove)
        view.model.base_model(input_ids=ids, use_cache=False)
    return all(_runs_alone(view, index, ids, seen) for index in view.layer_indices)


def _runs_alone(
    view: DecoderView, index: int, ids: Tensor, seen: Mapping[int, tuple[Tensor, Tensor, int]]
) -> bool:
    entering, expected, _ = seen[index]
    found: list[Tensor] = []
    layer = view.layer(index)
    with ExitStack() as stack:
        for other in view.layer_indices:
            if other != index:
                stack.enter_context(handing_through(view.layer(other), seen[other][2]))
        handles = (
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: with_hidden(entering, args, kwargs), with_kwargs=True
            ),
            layer.register_forward_hook(lambda *call: found.append(hidden_output(call[-1]))),
        )
        for handle in handles:
            stack.callback(handle.remove)
        try:
            view.model.base_model(input_ids=ids, use_cache=False)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            return False  # what another layer would have handed on is missing
    close = _TOLERANCE * float(expected.abs().max())
    return torch.allclose(found[0], expected, rtol=_TOLERANCE, atol=close)


@contextmanager
def handing_through(layer: nn.Module, length: int) -> Iterator[None]:
    """Let a decoder layer change nothing during a ``with`` block.

    Args:
        layer: The layer.
        length: Length of the tuple that it returns; 0 for a bare tensor.

    Yields:
        Nothing.
    """
    # On the instance: attributes that the model reads of a layer stay.
    layer.forward = hand_through(length)
    try:
        yield
    finally:
        del layer.forward


def hand_through(length: int) -> Callable[..., object]:
    """Return a layer's forward that changes nothing, in the form of the layer's own output.

    Args:
        length: Length of the tuple that the layer returns; 0 for a bare tensor.

    Returns:
        The function.
    """

    def forward(*args: object, **kwargs: object) -> object:
        hidden = hidden_input(args, kwargs)
        return (hidden, *[None] * (length - 1)) if length else hidden

    return forward
