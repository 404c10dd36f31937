"""Hidden states kept between passes, so that only the upper part of a model runs again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView

_TOLERANCE = 1e-2  # of two runs of one layer on the same numbers, in any dtype
_Args = tuple[object, ...]
_Kwargs = dict[str, object]
DEFAULT_LIMIT = 2 * 1024**3  # bytes


class HiddenCache:
    """Inputs of some decoder layers for every window, valid while no layer below them changes.

    A pass fills the cache. A later pass that measures layer l or higher starts from the highest
    cached layer at or below l; the layers below return their input unchanged. Sums stay bit-equal,
    since every layer receives the same numbers.

    Args:
        limit: Maximum bytes; the lowest layers are left out first.
    """

    def __init__(self, view: DecoderView, limit: int = DEFAULT_LIMIT) -> None:
        self._view = view
        self._limit = limit
        self._hidden: dict[int, dict[int, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self._index: list[int] = []

    def start_batch(self, index: Tensor) -> None:
        """Set the windows of the next forward pass: positions ``(B,)``, empty for padding."""
        self._index = index.tolist()

    def start_layer(self, measured: int, windows: Sequence[int]) -> int | None:
        """Return the highest cached layer at or below ``measured``; None if there is none."""
        usable = [
            layer
            for layer, hidden in self._hidden.items()
            if layer <= measured and hidden.keys() >= set(windows)
        ]
        return max(usable, default=None)

    def keep_only(self, layers: Sequence[int]) -> None:
        """Drop the cached inputs of all other layers."""
        self._hidden = {layer: self._hidden[layer] for layer in self._hidden if layer in layers}

    @contextmanager
    def capturing(self, layers: Sequence[int], num_windows: int) -> Iterator[None]:
        """Fill the cache during the forward passes of a ``with`` block.

        Args:
            layers: Layers whose input is kept, ascending.
            num_windows: Windows in all passes: a layer is kept for all of them or for none.
        """
        with ExitStack() as stack:
            for index in self._view.layer_indices:
                layer = self._view.layer(index)
                if index in layers:
                    # All inputs have one size, and higher layers save more of a pass.
                    num_kept = num_windows * (len(layers) - layers.index(index))
                    hook = partial(self._keep_input, index, num_kept)
                    stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
                note = noting_length(self._lengths, index)
                stack.enter_context(layer.register_forward_hook(note))
            yield

    @contextmanager
    def skipping(self, index: int) -> Iterator[None]:
        """Make one layer return its input; needs an earlier pass under ``capturing``."""
        with handing_through(self._view.layer(index), self._lengths[index]):
            yield

    @contextmanager
    def starting_from(self, start: int | None) -> Iterator[None]:
        """Skip the layers below ``start``, which takes its cached input; None runs all layers."""
        if start is None:
            yield
            return
        with ExitStack() as stack:
            for index in self._view.layer_indices:
                if index < start:
                    stack.enter_context(self.skipping(index))
            # Before every other hook: an observer may detach the graph at this layer.
            handle = self._view.layer(start).register_forward_pre_hook(
                partial(self._take_cached, start), with_kwargs=True, prepend=True
            )
            stack.enter_context(handle)
            yield

    @contextmanager
    def ending_at(self, last: int) -> Iterator[None]:
        """Skip the layers above ``last`` that have run once: nothing reads their output."""
        with ExitStack() as stack:
            for index in self._view.layer_indices:
                if index > last and index in self._lengths:
                    stack.enter_context(self.skipping(index))
            yield

    def _keep_input(
        self, index: int, num_kept: int, _: nn.Module, args: _Args, kwargs: _Kwargs
    ) -> None:
        hidden = hidden_input(args, kwargs).detach()
        if self._index and hidden[0].nbytes * num_kept <= self._limit:  # no index: padding
            rows = self._hidden.setdefault(index, {})
            rows.update(zip(self._index, hidden.clone().unbind(), strict=True))

    def _take_cached(
        self, index: int, _: nn.Module, args: _Args, kwargs: _Kwargs
    ) -> tuple[_Args, _Kwargs]:
        if not self._index:  # padding is not measured, so any input will do
            return args, kwargs
        hidden = torch.stack([self._hidden[index][window] for window in self._index])
        return with_hidden(hidden, args, kwargs)


def with_hidden(hidden: Tensor, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
    """Return a decoder layer's call arguments with other hidden states, ``(B, T, D)``."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def check_independent(
    view: DecoderView, method: MethodConfig, *, skips_parts: bool = False
) -> None:
    """Refuse settings that run layers one by one if layers share more than hidden states.

    Args:
        skips_parts: The method runs the model without single layers or blocks.

    Raises:
        ModelError: If layers pass on more than hidden states, such as keys and values.
    """
    if method.merge is not None and not pass_on_hidden_states_only(view):
        raise ModelError(
            f"decoder layers of {type(view.model).__name__} pass on more than hidden states, such "
            f"as keys and values, so method {method.name} cannot merge them: use another method"
        )
    keys = [key for key in ("refit", "removable") if getattr(method, key) not in {None, "none"}]
    runs_one_by_one = skips_parts or method.replacement is not None
    if (keys or runs_one_by_one) and not pass_on_hidden_states_only(view):
        settings = " and ".join(f"method.{key}: none" for key in keys)
        raise ModelError(
            f"decoder layers of {type(view.model).__name__} pass on more than hidden states, such "
            "as keys and values, so they cannot be run one by one: "
            + (f"set {settings}" if keys else f"use another method than {method.name}")
        )


@torch.no_grad()
def pass_on_hidden_states_only(view: DecoderView) -> bool:
    """Return whether each decoder layer gives the same output while the others return their input.

    It does not if a layer reads keys and values of an earlier one. Two tokens are run through every
    layer alone. All processes that share a model must call this.
    """
    ids = torch.zeros((1, 2), dtype=torch.int64, device=view.model.device)
    lengths: dict[int, int] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(index: int, _: nn.Module, args: _Args, kwargs: _Kwargs, output: object) -> None:
        seen[index] = hidden_input(args, kwargs), hidden_output(output)

    with ExitStack() as stack:
        for index in view.layer_indices:
            layer = view.layer(index)
            stack.enter_context(layer.register_forward_hook(partial(note, index), with_kwargs=True))
            stack.enter_context(layer.register_forward_hook(noting_length(lengths, index)))
        view.model.base_model(input_ids=ids, use_cache=False)
    return all(_runs_alone(view, index, ids, lengths, seen) for index in view.layer_indices)


def _runs_alone(
    view: DecoderView,
    index: int,
    ids: Tensor,
    lengths: Mapping[int, int],
    seen: Mapping[int, tuple[Tensor, Tensor]],
) -> bool:
    entering, expected = seen[index]
    call = partial(view.model.base_model, input_ids=ids, use_cache=False)
    with only_layers(view, index, index, lengths) as run:
        try:
            found = run(entering, call)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            return False  # it needs what another layer computes
    close = _TOLERANCE * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=close)


@contextmanager
def handing_through(layer: nn.Module, length: int) -> Iterator[None]:
    """Make a decoder layer return its input during a ``with`` block.

    Args:
        length: Length of the layer's output tuple; 0 for a bare tensor.
    """

    def forward(*args: object, **kwargs: object) -> object:
        hidden = hidden_input(args, kwargs)
        return (hidden, *[None] * (length - 1)) if length else hidden

    layer.forward = forward  # the layer stays in the model, because models read its attributes
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def only_layers(
    view: DecoderView, first: int, last: int, lengths: Mapping[int, int]
) -> Iterator[Callable[[Tensor, Callable[[], object]], Tensor]]:
    """Make all layers but some contiguous ones return their input during a ``with`` block.

    Args:
        first: The first layer that runs.
        last: The last one.
        lengths: Lengths of all layers' output tuples, see ``handing_through``.

    Yields:
        A function of the hidden states that enter the first layer and of a call of the model; it
        returns the hidden states that leave the last layer.
    """
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def take(_: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        return with_hidden(entering[-1], args, kwargs)

    def note(_module: nn.Module, _args: object, output: object) -> None:
        leaving.append(hidden_output(output))

    def run(hidden: Tensor, call: Callable[[], object]) -> Tensor:
        entering[:] = [hidden]
        leaving.clear()
        call()
        return leaving.pop()

    with ExitStack() as stack:
        for other in view.layer_indices:
            if not first <= other <= last:
                stack.enter_context(handing_through(view.layer(other), lengths[other]))
        start, end = view.layer(first), view.layer(last)
        stack.enter_context(start.register_forward_pre_hook(take, with_kwargs=True, prepend=True))
        stack.enter_context(end.register_forward_hook(note))
        yield run


def noting_length(lengths: dict[int, int], index: int) -> Callable[..., None]:
    """Return a forward hook that records the length of the output tuple, 0 for a bare tensor."""

    def note(_module: nn.Module, _args: object, output: object) -> None:
        lengths[index] = len(output) if isinstance(output, tuple) else 0

    return note
