"""Real tensors on the CPU, some of which pose as tensors on a GPU.

A storage poses once a tensor is moved or made there, and so does everything that is computed from
it. What a GPU would refuse is refused, and what would make the CPU wait for it is counted.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

POSED = torch.device("cuda", 0)
_ROOT = Path(__file__).parents[1]
_OURS = (f"{_ROOT}/grasp_lightning/", f"{_ROOT}/callbacks/")
_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten.copy_, _aten._to_copy}
_WAITS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.equal,
    _aten.bincount,
    _aten._linalg_check_errors,
}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_Args = tuple[Any, ...]  # Any: arguments of any operator
_Kwargs = Mapping[str, Any] | None  # Any: as above


class MixedDevicesError(Exception):
    """An operation that a GPU would refuse."""


class Posing:
    """Which storages pose, and how often each place in the code waited for them.

    Attributes:
        waits: Number of waits by place: file, line and function of ours, and what waited.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self.waits: Counter[str] = Counter()

    def mark(self, tensor: Tensor) -> Tensor:
        """Let the storage of a tensor pose."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def poses(self, tensor: Tensor) -> bool:
        """Return whether a tensor poses; on the meta device, none does."""
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return found is not None and not tensor.is_meta

    def wait(self, what: str) -> None:
        """Count a wait of the function of ours that caused it."""
        self.waits[f"{_place()} ({what})"] += 1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let tensors pose inside the block."""
        with _Functions(self), _Operations(self):
            yield


class _Operations(TorchDispatchMode):
    """Follows the storages that pose through all operations."""

    def __init__(self, posing: Posing) -> None:
        super().__init__()
        self._posing = posing

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: _Args = (), kwargs: _Kwargs = None
    ) -> object:
        del types
        kwargs = kwargs or {}
        packet, posing = func.overloadpacket, self._posing
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        posed = [tensor for tensor in tensors if posing.poses(tensor)]
        if posed and packet not in _BETWEEN_DEVICES:
            self._check(func, args, kwargs, tensors)
        if posed:
            self._count_waits(packet, args)
        run: Callable[..., object] = func
        found = run(*args, **kwargs)
        if posed and not (packet is _aten.copy_ and not posing.poses(args[0])):
            for part in tree_iter(found):
                if isinstance(part, Tensor):
                    posing.mark(part)
        return found

    def _check(self, func: OpOverload, args: _Args, kwargs: _Kwargs, tensors: list[Tensor]) -> None:
        written = args[0] if func._schema.is_mutable and isinstance(args[0], Tensor) else None
        others = [tensor for tensor in tensors if not self._posing.poses(tensor)]
        if any(other.ndim > 0 or other is written for other in others):
            shapes = [tuple(other.shape) for other in others]
            raise MixedDevicesError(f"{func} at {_place()}: {shapes} on the CPU")
        if any(isinstance(value, torch.Generator) for value in tree_iter((args, kwargs))):
            raise MixedDevicesError(f"{func} at {_place()}: the generator is on the CPU")

    def _count_waits(self, packet: object, args: _Args) -> None:
        if packet in _WAITS:
            self._posing.wait(str(packet))
        if packet in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._posing.wait(f"{packet} by a mask")
        if packet is _aten.copy_ and not self._posing.poses(args[0]):
            self._posing.wait("copy to the CPU")


class _Functions(TorchFunctionMode):
    """Shows the posed device, and moves tensors to and from it."""

    def __init__(self, posing: Posing) -> None:
        super().__init__()
        self._posing = posing
        # Any: functions and descriptors of torch
        self._of_all: dict[Any, str] = {
            Tensor.to: "_moved",
            Tensor.cpu: "_moved",
            Tensor.cuda: "_moved",
            Tensor.type_as: "_moved",
            Tensor.backward: "_backward",
            Tensor.pin_memory: "_pinned",
        }
        device: Any = Tensor.device
        is_cuda: Any = Tensor.is_cuda
        self._of_posed: dict[Any, str] = {
            device.__get__: "_device",
            is_cuda.__get__: "_is_cuda",
            Tensor.numpy: "_refused",
            Tensor.__array__: "_refused",
            Tensor.tolist: "_listed",
            Tensor.__deepcopy__: "_copied",
        }

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  any function of torch
        types: Sequence[type],
        args: _Args = (),
        kwargs: _Kwargs = None,
    ) -> object:
        del types
        kwargs, posing = dict(kwargs or {}), self._posing
        name = self._of_all.get(func)
        if args and isinstance(args[0], Tensor) and posing.poses(args[0]):
            name = name or self._of_posed.get(func)
        if name is not None:
            return getattr(self, name)(func, args, kwargs)
        if _is_posed(kwargs.get("device")):
            found = func(*args, **{**kwargs, "device": "cpu"})
            return posing.mark(found) if isinstance(found, Tensor) else found
        return func(*args, **kwargs)

    def _device(self, *_: object) -> torch.device:
        return POSED

    def _is_cuda(self, *_: object) -> bool:
        return True

    def _pinned(self, func: object, args: _Args, kwargs: object) -> Tensor:
        del func, kwargs
        found: Tensor = args[0]
        return found

    def _refused(self, func: Any, *_: object) -> None:  # noqa: ANN401  a function of torch
        raise MixedDevicesError(f"{func.__name__} at {_place()}")

    def _listed(self, func: Any, args: _Args, kwargs: dict[str, Any]) -> object:  # noqa: ANN401
        self._posing.wait("tolist")
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: _Args, kwargs: dict[str, Any]) -> Tensor:  # noqa: ANN401
        return self._posing.mark(func(*args, **kwargs))

    def _backward(self, func: object, args: _Args, kwargs: dict[str, Any]) -> None:
        del func
        with self:  # hooks run inside it, where the mode would not be active
            torch.autograd.backward(args[0], kwargs.pop("gradient", None), **kwargs)

    def _moved(self, func: object, args: _Args, kwargs: dict[str, Any]) -> Tensor:
        source, posing = args[0], self._posing
        before = after = posing.poses(source)
        for value in (*args[1:], kwargs.pop("device", None), kwargs.pop("other", None)):
            if isinstance(value, Tensor):
                after = posing.poses(value)
                kwargs["dtype"] = value.dtype
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif isinstance(value, str | torch.device):
                after = _is_posed(value)
                kwargs["device"] = "meta" if torch.device(value).type == "meta" else "cpu"
        after &= func is not Tensor.cpu
        kwargs = {**kwargs, "device": kwargs.get("device", "cpu"), "non_blocking": False}
        if after == before:
            same: Tensor = source.to(**kwargs)
            return same
        if before:
            posing.wait("copy to the CPU")
        with _disable_current_modes():
            found: Tensor = source.to(**{**kwargs, "copy": True})
        return posing.mark(found) if after else found


class _PosedAccelerator(CPUAccelerator):
    """Lightning's CPU, as a GPU."""

    def setup_device(self, device: torch.device) -> None:
        assert device == POSED

    @staticmethod
    def parse_devices(devices: Any) -> Any:  # noqa: ANN401  as Lightning defines it
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:  # noqa: ANN401
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    def name() -> str:
        return "cuda"


def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch and Lightning see a GPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", _nothing)
    # Threads that read ahead have no mode.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    # A mode is not active inside the operations that it handles, and hooks run there.
    monkeypatch.setattr(torch.autograd, "has_torch_function", lambda _: False)
    monkeypatch.setitem(AcceleratorRegistry["cuda"], "accelerator", _PosedAccelerator)


def _nothing(*_: object) -> None:
    """Stand in for a question about graphs of a real GPU."""


def _is_posed(device: object) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == POSED.type


def _place() -> str:
    """Return the innermost function of ours that is running, and the package that it called."""
    frame, package = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            where = str(Path(path).relative_to(_ROOT)).replace(
                "grasp_lightning/callbacks", "callbacks"
            )
            return f"{where} {frame.f_code.co_qualname}{package}"
        parts = path.partition("site-packages/")[2].split("/")
        if not package and parts[0] in {"transformers", "lightning"}:
            package = f" in {parts[0]}"
        frame = frame.f_back  # type: ignore[assignment]  # the outermost has none
    return "no function of ours"
