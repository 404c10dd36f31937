"""Hooks that read inputs and output gradients of linears, window by window.

Nothing reads ``.grad``: all parameters stay frozen, and a linear's input x and output gradient
dL/dy give everything needed. The numbers are therefore exact under any data-parallel strategy.

Legend: T tokens of a window, N output and M input features of a linear.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from grasp_lightning.models.calls import hidden_input
from grasp_lightning.models.decoder import DecoderView

WindowSink = Callable[[str, Tensor, Tensor], None]
InputSink = Callable[[str, Tensor], None]
_Args = tuple[object, ...]
_Kwargs = dict[str, object]


class _Hooks(ABC):
    """Hooks on some linears and on the first decoder layer they need."""

    def __init__(self, view: DecoderView, modules: tuple[str, ...]) -> None:
        self._view = view
        self._modules = modules
        self._batch_size = 1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model during a ``with`` block."""
        with ExitStack() as stack:
            first = self._view.layer(self._first_layer())
            stack.enter_context(first.register_forward_pre_hook(self._enter, with_kwargs=True))
            for name in self._modules:
                module = self._view.module(name)
                stack.enter_context(module.register_forward_hook(partial(self._read, name)))
            yield

    @abstractmethod
    def _first_layer(self) -> int:
        """Return the original number of that layer."""

    @abstractmethod
    def _enter(self, _: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """Observe that layer's arguments, and replace them unless None is returned."""

    @abstractmethod
    def _read(self, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Read one call of a linear."""


class LinearObserver(_Hooks):
    """Passes (x, dL/dy) of each window and linear to a sink during the backward pass.

    The input of the lowest observed decoder layer is detached and requires grad, so that the
    backward pass ends there. All parameters must be frozen.

    Args:
        modules: Original names of the observed linears.
        sink: Called with (module name, x ``(T, M)``, dL/dy ``(T, N)``) once per window.
    """

    def __init__(self, view: DecoderView, modules: tuple[str, ...], sink: WindowSink) -> None:
        super().__init__(view, modules)
        self._sink = sink

    def _first_layer(self) -> int:
        owners = {name: i for i in self._view.layer_indices for name in self._view.linears(i)}
        return min(owners[name] for name in self._modules)

    def _enter(self, _: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        hidden = hidden_input(args, kwargs)
        self._batch_size = hidden.shape[0]
        leaf = hidden.detach().requires_grad_(True)
        if args:
            return (leaf, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf}

    def _read(self, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            # Some families flatten (B, T, M) to (B * T, M) before a linear.
            x = args[0].detach().reshape(self._batch_size, -1, args[0].shape[-1])
            hook = partial(self._split, name, x)
            output.register_hook(hook)  # type: ignore[no-untyped-call]  # untyped in torch

    def _split(self, name: str, x: Tensor, grad: Tensor) -> None:
        grad = grad.detach().reshape(*x.shape[:2], grad.shape[-1])
        for x_TM, grad_TN in zip(x, grad, strict=True):
            self._sink(name, x_TM, grad_TN)


class InputObserver(_Hooks):
    """Passes x of each window and linear to a sink during a forward pass.

    Args:
        modules: Original names of the observed linears.
        sink: Called with (module name, x ``(T, M)``) once per window.
    """

    def __init__(self, view: DecoderView, modules: tuple[str, ...], sink: InputSink) -> None:
        super().__init__(view, modules)
        self._sink = sink

    def _first_layer(self) -> int:
        return self._view.layer_indices[0]

    def _enter(self, _: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        self._batch_size = hidden_input(args, kwargs).shape[0]

    def _read(self, name: str, _: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        x = args[0].detach()
        for x_TM in x.reshape(self._batch_size, -1, x.shape[-1]):
            self._sink(name, x_TM)


def shared_inputs(view: DecoderView, modules: tuple[str, ...]) -> dict[str, str]:
    """Map each linear to the first one called with the same input tensor, possibly itself.

    Such groups are q, k and v, or gate and up. A short forward pass finds them.

    Args:
        modules: Original names of linears, in model order.
    """
    readers: dict[int, str] = {}
    sources = dict(zip(modules, modules, strict=True))
    kept: list[Tensor] = []  # so that no two tensors share an id

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0])
        sources[name] = readers.setdefault(id(args[0]), name)

    with ExitStack() as stack, torch.no_grad():
        for name in modules:
            module = view.module(name)
            stack.enter_context(module.register_forward_pre_hook(partial(note, name)))
        ids = torch.zeros((1, 2), dtype=torch.int64, device=view.model.device)
        view.model.base_model(input_ids=ids, use_cache=False)
    return sources
