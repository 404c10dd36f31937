"""Models whose decoder layers stay on disk: a layer has its weights only while it runs.

Everything outside the decoder layers is loaded as usual. The parameters of a layer are on the meta
device, except during a call of the layer, or while it is held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import weights_of
from grasp_lightning.models.operations.base import applier_of
from grasp_lightning.models.weight_files import ADVICE, fault
from grasp_lightning.plan import Operation
from grasp_lightning.reading.on_access import OnAccess, merged
from grasp_lightning.reading.tensors import open_tensors

_ATTRIBUTE: Final = "_streamed_weights"  # of the model, which owns them


class StoredAt(NamedTuple):
    """Where a tensor is stored: a safetensors file, and the name in it."""

    path: Path
    key: str


class StreamedWeights:
    """Reads the weights of decoder layers from safetensors files, one layer at a time.

    A compressed layer is read dense, and its operations are applied again: so its weights are the
    same as in a model that was compressed in memory.

    Args:
        view: The dense model, with the parameters of its decoder layers on the meta device.
        files: Where each tensor of the model is stored, by its name in the model.
        device: Where layers run.

    Attributes:
        device: Where layers run.
    """

    def __init__(
        self, view: DecoderView, files: Mapping[str, StoredAt], device: torch.device
    ) -> None:
        self.device = device
        self._view = view
        self._files = files
        self._layers = {index: view.layer(index) for index in view.layer_indices}
        self._prefixes = {i: f"{view.layers_name}.{i}." for i in self._layers}
        self._wanted = {index: _stored(layer) for index, layer in self._layers.items()}
        self._operations: dict[int, list[Operation]] = {}
        self._tensors: Mapping[str, Tensor] = {}
        self._dense: dict[int, dict[str, nn.Module]] = {}
        self._loaded: set[int] = set()
        self._held: set[int] = set()
        self._following: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        for index, layer in self._layers.items():
            layer.register_forward_pre_hook(partial(self._enter, index))
            layer.register_forward_hook(partial(self._leave, index), always_call=True)
        holder: Any = view.model  # Any: an attribute that transformers does not declare
        setattr(holder, _ATTRIBUTE, self)

    @property
    def materialised(self) -> frozenset[int]:
        """Original numbers of the layers whose weights are in memory, on any device."""
        following = set() if self._following is None else {self._following[0]}
        return frozenset(self._loaded | following)

    def note(
        self, view: DecoderView, operations: Iterable[Operation], tensors: Mapping[str, Tensor]
    ) -> None:
        """Apply operations, which are about to be applied to the model, in all later loads.

        Args:
            view: The model, still without them.
            operations: Each changes linears of one decoder layer, or no values at all.
            tensors: Their tensors, which are read in each load.
        """
        self._view = view
        self.use(tensors)
        for operation in operations:
            if not operation.linears:
                continue
            index = view.layer_of(operation.linears[0])
            assert index is not None  # other operations are refused for streamed models
            dense = self._dense.setdefault(index, {})
            for name in operation.linears:
                dense.setdefault(name, view.module(name))
            self._operations.setdefault(index, []).append(operation)

    def use(self, tensors: Mapping[str, Tensor]) -> None:
        """Read tensors of operations from another place from now on."""
        self._tensors = merged(self._tensors, tensors)

    def read_from(self, files: Mapping[str, StoredAt]) -> None:
        """Read tensors, by their name in the model, from other files from now on."""
        self._take(None)  # it may have been read before from the present file
        self._files = {**self._files, **files}

    def dense_weight(self, module: str) -> Tensor:
        """Return the weight of a linear of the dense model, ``(N, M)``, on the device."""
        index = self._view.layer_of(module)
        assert index is not None
        key = f"{module}.weight".removeprefix(self._prefixes[index])
        tensor = self._read(index, (key,))[key].to(self.device)
        return tensor.mT if isinstance(self._view.module(module), Conv1D) else tensor

    def tensors(
        self,
        names: Iterable[str],
        state: Callable[[int | None], Mapping[str, Tensor]] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name; a layer is held for all of its own.

        Args:
            names: Present names; those of one layer follow each other.
            state: Returns tensors by name while a layer of some present number is held; None: those
                of the model's state dict.
        """
        groups = [(index, list(group)) for index, group in groupby(names, self._layer_of)]
        following = [index for index, _ in groups[1:]] + [None]
        for (index, group), after in zip(groups, following, strict=True):
            with nullcontext() if index is None else self.holding(index, after):
                model = self._view.model
                position = self._view.layer_of(group[0])
                found = model.state_dict() if state is None else state(position)
                for name in group:
                    yield name, found[name]

    def _layer_of(self, name: str) -> int | None:
        """Return the original number of the layer of a present name; None outside the layers."""
        position = self._view.layer_of(name)
        return None if position is None else self._view.layer_indices[position]

    @contextmanager
    def holding(self, index: int, following: int | None = None) -> Iterator[None]:
        """Keep a layer's weights during a ``with`` block, while a thread reads the next layer's.

        Args:
            index: Original number of the layer.
            following: The layer that will be held next; None if it is not known.
        """
        self._load(index)
        self._held.add(index)
        self._prefetch(following)
        try:
            yield
        finally:
            self._held.discard(index)
            self._release(index)

    def _enter(self, index: int, layer: nn.Module, _: object) -> None:
        if (
            "forward" not in layer.__dict__
        ):  # another function stands in for a layer that is skipped
            self._load(index)

    def _leave(self, index: int, *_: object) -> None:
        if index not in self._held:
            self._release(index)

    def _load(self, index: int) -> None:
        if index in self._loaded:
            return
        layer, tensors = self._layers[index], self._take(index)
        self._loaded.add(index)
        for name, module in self._dense.get(index, {}).items():
            self._view.set_module(name, module)
        for key, tensor in tensors.items():
            _set(layer, key, tensor.to(self.device, non_blocking=True))
        for operation in self._operations.get(index, ()):
            applier_of(operation).apply(self._view, operation, self._tensors)

    def _release(self, index: int) -> None:
        if index not in self._loaded:
            return
        layer = self._layers[index]
        for key, tensor in layer.state_dict().items():
            _set(layer, key, torch.empty_like(tensor, device="meta"))
        # Dense modules that operations have replaced keep no weights either.
        for module in self._dense.get(index, {}).values():
            for key, tensor in module.state_dict().items():
                _set(module, key, torch.empty_like(tensor, device="meta"))
        self._loaded.discard(index)

    def _prefetch(self, index: int | None) -> None:
        if index is not None and index not in self.materialised:
            self._take(None)
            self._following = index, self._reader.submit(self._read, index, self._wanted[index])

    def _take(self, index: int | None) -> dict[str, Tensor]:
        """Return the tensors of a layer, read now or before; what else was read before is freed."""
        found, self._following = self._following, None
        if found is not None:
            tensors = found[1].result()
            if found[0] == index:
                return tensors
        return {} if index is None else self._read(index, self._wanted[index])

    def _read(self, index: int, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors of a dense layer on the CPU, by their names inside the layer."""
        prefix, wanted = self._prefixes[index], self._wanted[index]
        found = read_stored(self._files, [f"{prefix}{key}" for key in keys])
        is_pinned = self.device.type == "cuda"
        tensors = {}
        for key in keys:
            tensor = found[f"{prefix}{key}"].to(wanted[key])
            tensors[key] = tensor.pin_memory() if is_pinned else tensor
        return tensors


def streamed_weights(model: nn.Module) -> StreamedWeights | None:
    """Return what reads the decoder layers of a model; None if the model is whole."""
    found = getattr(model, _ATTRIBUTE, None)
    assert found is None or isinstance(found, StreamedWeights)
    return found


@contextmanager
def holding(model: nn.Module, index: int, following: int | None = None) -> Iterator[None]:
    """Keep the weights of a decoder layer during a ``with`` block, if the model is streamed.

    Args:
        model: A model, whole or streamed.
        index: Original number of the layer.
        following: The layer that will be held next; None if it is not known.
    """
    weights = streamed_weights(model)
    if weights is None:
        yield
        return
    with weights.holding(index, following):
        yield


@contextmanager
def holding_all(
    model: nn.Module, first: int, last: int, following: int | None = None
) -> Iterator[None]:
    """Keep the weights of decoder layers ``first`` to ``last``, as ``holding`` does for one."""
    with ExitStack() as held:
        for index in range(first, last + 1):
            after = index + 1 if index < last else following
            held.enter_context(holding(model, index, after))
        yield


def dense_weights(view: DecoderView, modules: Iterable[str]) -> Mapping[str, Tensor]:
    """Return the weights of dense linears, ``(N, M)``, and readers of experts, by full name.

    Those of a streamed model are read on access, one by one.
    """
    weights = streamed_weights(view.model)
    if weights is not None:
        return OnAccess({name: partial(weights.dense_weight, name) for name in modules})
    return weights_of(view, modules)


def read_stored(files: Mapping[str, StoredAt], names: Sequence[str]) -> dict[str, Tensor]:
    """Return stored tensors by name, on the CPU and in memory of their own.

    Args:
        files: Where each tensor is stored, by name.
        names: Names of the tensors to read.
    """
    found: dict[str, Tensor] = {}
    for path in sorted({files[name].path for name in names}):
        with open_tensors(path, ModelError, fault(path), ADVICE) as content:
            own = {name: files[name].key for name in names if files[name].path == path}
            found |= {name: content.get_tensor(key).clone() for name, key in own.items()}
    return found


def _stored(layer: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter and persistent buffer by its name inside a layer."""
    return {key: tensor.dtype for key, tensor in layer.state_dict().items()}


def _set(root: nn.Module, key: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer of a name inside a module."""
    path, _, name = key.rpartition(".")
    module = root.get_submodule(path)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
