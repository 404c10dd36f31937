"""Principal directions of the hidden states, block after block on the sliced states.

Legend: B windows of T tokens, D hidden size, d kept directions, Q ``(D, d)`` the orthonormal basis
of one read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor, nn

from grasp_lightning import processes
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.directions import aligned, principal_directions
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.stream import Stream, stream_of
from grasp_lightning.plan import StreamRead
from grasp_lightning.stats.base import StreamBases, StreamBasis
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner

_STATES = "stream"
_BASIS, _VARIANCES = "basis", "variances"


class LayerStore(Protocol):
    """Stores the bases of layers that are finished."""

    def load(self, number: int) -> Mapping[str, Tensor] | None:
        """Return the tensors of a layer; None if it is not finished."""

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a layer."""


class _SeenError(Exception):
    """Ends a forward pass once everything needed has been observed."""


def stream_bases(
    view: DecoderView,
    asked: StreamBases,
    data: CalibrationData,
    *,
    track: Callable[[Sequence[str], str], Iterable[str]],
    max_bytes: float,
    store: LayerStore | None = None,
) -> dict[str, StreamBasis]:
    """Return the basis of every read, by the name of its first norm.

    A basis holds the leading eigenvectors of the sum of ``x^T x``, over the real tokens of the
    states x that enter the read, where all earlier reads are sliced already. The sliced model
    computes as the dense one does if every read replaces its states x by ``x Q Q^T``, for the
    block and for the residual connection; so the dense model runs, with hooks, layer by layer.

    Args:
        view: The dense model, which is unchanged afterwards.
        asked: How many directions, of what.
        data: The calibration windows; processes share them.
        track: Shows progress.
        max_bytes: Memory for hidden states; the rest is stored in files.
        store: Holds the finished layers of earlier starts, and keeps those of this one.
    """
    stream = stream_of(view)
    with TemporaryDirectory() as folder, frozen(view.model), torch.no_grad():
        walk = _Walk(view, stream, asked, data, HiddenStates(Path(folder), max_bytes))
        walk.start()
        layers = {str(index): index for index in view.layer_indices}
        for name in track([*layers, "head"], "rotate hidden states"):
            reads = walk.reads_of(layers.get(name))
            number = layers.get(name, view.num_layers)
            found = None if store is None else store.load(number)
            if found is None:
                walk.measure(reads)
                if store is not None:
                    store.save(number, walk.tensors(reads))
            else:
                walk.take(reads, found)
            if name in layers:
                walk.advance(layers[name], reads)
        return walk.bases


class _Walk:
    """The hidden states on their way through the model, and the bases found so far."""

    def __init__(
        self,
        view: DecoderView,
        stream: Stream,
        asked: StreamBases,
        data: CalibrationData,
        hidden: HiddenStates,
    ) -> None:
        self._view = view
        self._stream = stream
        self._asked = asked
        self._hidden = hidden
        self._runner = LayerRunner(view)
        windows = data.windows
        self._batches: dict[int, dict[str, Tensor]] = {
            number: windows.batch(rows) if rows else windows.padding()
            for number, rows in enumerate(data.batches)
        }
        self._projections: dict[str, _Projection] = {}
        self.bases: dict[str, StreamBasis] = {}

    def start(self) -> None:
        """Store what enters the first layer."""
        first = self._view.layer_indices[0]
        for number, entering in self._runner.inputs_of(first, self._batches):
            self._hidden[_STATES, number] = entering

    def reads_of(self, layer: int | None) -> list[StreamRead]:
        """Return the reads of a layer, or of the head."""
        reads = self._stream.reads
        return [read for read in reads if self._view.layer_of(read.norms[0]) == layer]

    def measure(self, reads: Sequence[StreamRead]) -> None:
        """Find the bases of the reads of one layer, in order."""
        for position, read in enumerate(reads):
            size = self._stream.size
            shape, device = (size, size), self._view.model.device
            gram = torch.zeros(shape, dtype=torch.float64, device=device)
            for number, states in self._entering(read, reads[:position]):
                batch = self._batches[number]
                mask = batch["mask"].to(device) & (len(batch["index"]) > 0)  # none in padding
                # Some families flatten windows and tokens.
                windows = states.reshape(*mask.shape, size)
                for window, is_real in zip(windows, mask, strict=True):
                    gram += self._gram(window[is_real], read)
            self._add(read, self._basis(read, processes.summed({_BASIS: gram})[_BASIS]))

    def take(self, reads: Sequence[StreamRead], stored: Mapping[str, Tensor]) -> None:
        """Use the bases that an earlier start has found."""
        for read in reads:
            name = read.norms[0]
            self._add(
                read,
                StreamBasis(
                    basis=stored[f"{name}.{_BASIS}"], variances=stored[f"{name}.{_VARIANCES}"]
                ),
            )

    def tensors(self, reads: Sequence[StreamRead]) -> dict[str, Tensor]:
        """Return the bases of some reads as tensors, for ``take``."""
        found = {read.norms[0]: self.bases[read.norms[0]] for read in reads}
        return {
            f"{name}.{part}": value
            for name, basis in found.items()
            for part, value in basis._asdict().items()
        }

    def advance(self, layer: int, reads: Sequence[StreamRead]) -> None:
        """Move the states through a layer whose reads are sliced."""
        with self._runner.only(layer) as run, self._sliced(reads):
            for number, batch in self._batches.items():
                self._hidden[_STATES, number] = run(batch, self._hidden[_STATES, number])

    def _entering(
        self, read: StreamRead, earlier: Sequence[StreamRead]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each batch's number and the states that enter a read, ``(B, T, D)``."""
        if not earlier:
            yield from ((number, self._hidden[_STATES, number]) for number in self._batches)
            return
        layer = self._view.layer_of(read.norms[0])
        assert layer is not None  # the head has one read
        found: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[:] = [args[0]]
            raise _SeenError

        norm = self._view.module(read.norms[0])
        with (
            self._runner.only(layer) as run,
            self._sliced(earlier),
            norm.register_forward_pre_hook(keep),
        ):
            for number, batch in self._batches.items():
                with suppress(_SeenError):
                    run(batch, self._hidden[_STATES, number])
                yield number, found.pop()

    def _gram(self, states: Tensor, read: StreamRead) -> Tensor:
        """Return ``x^T x`` of the states of one window, ``(T, D) -> (D, D)``, in float64."""
        wide = _centered(states.double(), centers=self._stream.centers)
        if self._asked.directions_of == "normed":
            eps = self._stream.forms[read.norms[0]].eps
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return wide.mT @ wide

    def _basis(self, read: StreamRead, gram: Tensor) -> StreamBasis:
        if not gram.isfinite().all():
            raise NumericsError(
                f"hidden states at {read.norms[0]} are NaN or infinite; check the checkpoint, or "
                "set model.dtype to float32 if it is narrower"
            )
        found, variances = principal_directions(
            gram, self._asked.width, without_mean=self._stream.centers
        )
        if self.bases:
            found = aligned(found, next(reversed(self.bases.values())).basis.to(found))
        dtype = torch.promote_types(self._view.model.dtype, torch.float32)
        return StreamBasis(
            # Bases must be equal in all processes to the last bit.
            basis=processes.from_rank(found.to(dtype).contiguous(), 0).cpu(),
            variances=processes.from_rank(variances.float().contiguous(), 0).cpu(),
        )

    def _add(self, read: StreamRead, basis: StreamBasis) -> None:
        name = read.norms[0]
        self.bases[name] = basis
        wide = basis.basis.to(self._view.model.device)
        self._projections[name] = _Projection(wide, centers=self._stream.centers)

    @contextmanager
    def _sliced(self, reads: Iterable[StreamRead]) -> Iterator[None]:
        """Let the dense model compute what the sliced one does at some reads."""
        with ExitStack() as stack:
            for read in reads:
                projection = self._projections[read.norms[0]]
                for norm in read.norms:
                    hook = projection.enter
                    stack.enter_context(self._view.module(norm).register_forward_pre_hook(hook))
                writer = self._view.module(read.writers[0])
                stack.enter_context(writer.register_forward_hook(projection.leave))
            yield


class _Projection:
    """Replaces states by their projection, for a block and for the residual connection."""

    def __init__(self, basis: Tensor, *, centers: bool) -> None:
        self._basis = basis
        self._centers = centers
        self._removed: Tensor | None = None

    def enter(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give a norm the projected states; what was removed is subtracted in ``leave``."""
        states = args[0]
        wide = _centered(states.to(self._basis.dtype), centers=self._centers)
        projected = (wide @ self._basis @ self._basis.mT).to(states.dtype)
        self._removed = projected - states
        return (projected, *args[1:])

    def leave(self, _: nn.Module, _args: object, output: Tensor) -> Tensor:
        """Take what was removed from the residual connection, which adds the output."""
        removed, self._removed = self._removed, None
        assert removed is not None  # the norm runs before the linear
        return output + removed


def _centered(states: Tensor, *, centers: bool) -> Tensor:
    return states - states.mean(dim=-1, keepdim=True) if centers else states
