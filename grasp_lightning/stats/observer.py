"""Hooks that read inputs and output gradients of linears and other modules.

Nothing reads ``.grad``: all parameters stay frozen, and a module's input x and output gradient
dL/dy give everything needed. The numbers are therefore exact under any data-parallel strategy.

Legend: T tokens of a window, N output and M input features of a linear.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from grasp_lightning.linalg.precision import full_precision
from grasp_lightning.models.calls import hidden_input
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.mixtures import (
    RoutedTokens,
    by_window,
    check_layout,
    gradients_of_sum,
    routed_tokens,
)
from grasp_lightning.models.sharding import whole

Inputs = Tensor | RoutedTokens
# Any: Inputs; most sinks ask for linears alone, whose inputs are tensors.
WindowSink = Callable[[str, Any, Tensor], None]
InputSink = Callable[[str, Any], None]
GradientSink = Callable[[str, Mapping[str, Tensor]], None]
_Args = tuple[object, ...]
_Kwargs = dict[str, object]


class _Hooks(ABC):
    """Hooks on some modules and on the first decoder layer they need."""

    def __init__(self, view: DecoderView, modules: tuple[str, ...]) -> None:
        self._view = view
        self._modules = modules
        self._batch_size = 1
        self._known: set[str] = set()  # experts whose layout was checked

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model during a ``with`` block."""
        with ExitStack() as stack:
            first = self._view.layer(self._first_layer())
            stack.enter_context(first.register_forward_pre_hook(self._enter, with_kwargs=True))
            for name in self._modules:
                module, hook = self._view.module(name), partial(self._read, name)
                stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
            yield

    @abstractmethod
    def _first_layer(self) -> int:
        """Return the original number of that layer."""

    @abstractmethod
    def _enter(self, _: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """Observe that layer's arguments, and replace them unless None is returned."""

    @abstractmethod
    def _read(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: _Kwargs,
        output: Tensor,
    ) -> object:
        """Read one call of a module, and replace its output unless None is returned."""

    def _windows(
        self, name: str, module: nn.Module, args: _Args, kwargs: _Kwargs, output: Tensor
    ) -> list[Inputs]:
        """Return what each window gives to a linear, ``(T, M)``, or to experts."""
        if isinstance(module, DenseModule):
            x = args[0]
            assert isinstance(x, Tensor)  # of every linear
            # Some families flatten (B, T, M) to (B * T, M) before a linear.
            return list(x.detach().reshape(self._batch_size, -1, x.shape[-1]))
        routed = routed_tokens(module, name, (*args, *kwargs.values()), self._batch_size)
        if name not in self._known:
            outputs = by_window(routed[0].layout, output.detach(), len(routed))
            check_layout(name, routed[0], outputs[0])
            self._known.add(name)
        return list(routed)


class _BackwardHooks(_Hooks):
    """Hooks for a backward pass, which needs all parameters frozen.

    The input of the lowest observed decoder layer is detached and requires grad, so that the
    backward pass ends there.
    """

    def _enter(self, _: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        hidden = hidden_input(args, kwargs)
        self._batch_size = hidden.shape[0]
        leaf = hidden.detach().requires_grad_(True)
        if args:
            return (leaf, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf}


class LinearObserver(_BackwardHooks):
    """Passes (x, dL/dy) of each window and linear to a sink during the backward pass.

    Args:
        modules: Original names of the observed linears and experts.
        sink: Called with (module name, x ``(T, M)``, dL/dy ``(T, N)``) once per window; for
            experts, x are their routed tokens.
    """

    def __init__(self, view: DecoderView, modules: tuple[str, ...], sink: WindowSink) -> None:
        super().__init__(view, modules)
        self._sink = sink

    def _first_layer(self) -> int:
        return min(self._view.layer_of(name) or 0 for name in self._modules)

    def _read(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: _Kwargs,
        output: Tensor,
    ) -> None:
        if output.requires_grad:
            windows = self._windows(name, module, args, kwargs, output)
            hook = partial(self._split, name, windows)
            output.register_hook(hook)  # type: ignore[no-untyped-call]  # untyped in torch

    def _split(self, name: str, windows: list[Inputs], grad: Tensor) -> None:
        grad, routed = grad.detach(), [x for x in windows if isinstance(x, RoutedTokens)]
        if routed:
            grad = gradients_of_sum(name, routed, grad)
        grad = grad.reshape(len(windows), -1, grad.shape[-1])
        for x, grad_TN in zip(windows, grad, strict=True):
            self._sink(name, x, grad_TN)


class ParameterObserver(_BackwardHooks):
    """Passes the gradients of all parameters in some decoder layers to a sink.

    Those of linears follow from x and dL/dy. Other modules, such as norms, run once more on their
    inputs, which gives the gradients by their own derivative: so norms with an offset and fused
    experts are covered.

    Args:
        layers: Original numbers of the observed layers.
        sink: Called with (module name, gradient of each own parameter by its name in the module,
            summed over a batch, float32 or better), one or more times per call of the module.

    Attributes:
        called: Names of the modules that took part in a backward pass.
    """

    def __init__(self, view: DecoderView, layers: tuple[int, ...], sink: GradientSink) -> None:
        super().__init__(view, parameter_owners(view, layers))
        self._layers = layers
        self._sink = sink
        self._runs_again = False
        self.called: set[str] = set()

    def _first_layer(self) -> int:
        return min(self._layers)

    def _read(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: _Kwargs,
        output: Tensor | tuple[object, ...],
    ) -> tuple[object, ...] | None:
        if self._runs_again:
            return None
        is_single = isinstance(output, Tensor)
        outputs: list[object] = [output] if is_single else list(output)
        for position, part in enumerate(outputs):
            if isinstance(part, Tensor) and part.requires_grad:
                self.called.add(name)
                if isinstance(module, DenseModule):
                    hook = partial(self._of_linear, name, module, args[0].detach())
                else:
                    hook = partial(self._of_module, name, module, args, kwargs, position)
                # One output may be computed from another: a copy has only its own readers.
                read = part if is_single else part.view_as(part)
                read.register_hook(hook)  # type: ignore[no-untyped-call]  # untyped in torch
                outputs[position] = read
        return None if is_single else tuple(outputs)

    def _of_linear(self, name: str, module: DenseModule, x: Tensor, grad: Tensor) -> None:
        x, grad = _wide(x).flatten(0, -2), _wide(grad.detach()).flatten(0, -2)
        with full_precision(x.device):
            weight = x.mT @ grad if isinstance(module, Conv1D) else grad.mT @ x
        gradients = {"weight": weight}
        if module.bias is not None:
            gradients["bias"] = grad.sum(dim=0)
        self._sink(name, gradients)

    def _of_module(  # noqa: PLR0917  what partial binds
        self,
        name: str,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: _Kwargs,
        position: int,
        grad: Tensor,
    ) -> None:
        """Sum up what one output contributes: the outputs of a module add up."""
        own = {
            key: _wide(whole(parameter.detach())).requires_grad_(True)
            for key, parameter in module.named_parameters(recurse=False)
        }
        inputs = tuple(map(_detached, args))
        more = {key: _detached(value) for key, value in kwargs.items()}
        self._runs_again = True
        try:
            with torch.enable_grad(), full_precision(grad.device):
                output = functional_call(module, own, inputs, more)
        finally:
            self._runs_again = False
        part = output if isinstance(output, Tensor) else output[position]
        found = torch.autograd.grad(
            part, tuple(own.values()), grad.detach().to(part.dtype), allow_unused=True
        )
        pairs = zip(own, found, strict=True)
        self._sink(name, {key: value for key, value in pairs if value is not None})


def parameter_owners(view: DecoderView, layers: Iterable[int]) -> tuple[str, ...]:
    """Return the names of all modules in some layers that hold parameters themselves."""
    found: list[str] = []
    for index in layers:
        prefix = f"{view.layers_name}.{index}"
        for name, module in view.layer(index).named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                found.append(f"{prefix}.{name}" if name else prefix)
    return tuple(found)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _detached(value: object) -> object:
    """Return an argument without its graph, and in float32 if it is a narrower float."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return _wide(value) if value.is_floating_point() else value


class InputObserver(_Hooks):
    """Passes x of each window and linear to a sink during a forward pass.

    Args:
        modules: Original names of the observed linears and experts.
        sink: Called with (module name, x ``(T, M)``) once per window; for experts, x are their
            routed tokens.
    """

    def __init__(self, view: DecoderView, modules: tuple[str, ...], sink: InputSink) -> None:
        super().__init__(view, modules)
        self._sink = sink

    def _first_layer(self) -> int:
        return self._view.layer_indices[0]

    def _enter(self, _: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        self._batch_size = hidden_input(args, kwargs).shape[0]

    def _read(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: _Kwargs,
        output: Tensor,
    ) -> None:
        for x in self._windows(name, module, args, kwargs, output):
            self._sink(name, x)


def shared_inputs(view: DecoderView, modules: tuple[str, ...]) -> dict[str, str]:
    """Map each linear to the first one called with the same input tensor, possibly itself.

    Such groups are q, k and v, or gate and up. A short forward pass finds them. Experts share with
    none.

    Args:
        modules: Original names of linears and experts, in model order.
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
            if isinstance(module, DenseModule):
                stack.enter_context(module.register_forward_pre_hook(partial(note, name)))
        ids = torch.zeros((1, 2), dtype=torch.int64, device=view.model.device)
        view.model.base_model(input_ids=ids, use_cache=False)
    return sources
