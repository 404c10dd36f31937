"""Hidden states that move through a model one decoder layer at a time.

Legend: B windows of T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import OutputError
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.models.source import first_line
from grasp_lightning.models.streamed import holding, streamed_weights
from grasp_lightning.models.surgery import in_place_of_linears
from grasp_lightning.training.hidden_cache import (
    handing_through,
    noting_length,
    only_layers,
    with_hidden,
)

DENSE, COMPRESSED = "dense", "compressed"


class HiddenStates:
    """Hidden states by name and batch, in memory up to a limit and on disk beyond it.

    Args:
        folder: An existing folder for the files.
        limit: Maximum bytes in memory.
        device: Where they are used; they are kept on the CPU. None keeps them where they are.
    """

    def __init__(self, folder: Path, limit: float, device: torch.device | None = None) -> None:
        self._folder = folder
        self._limit = limit
        self._device = device
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._bytes = 0

    def __getitem__(self, place: tuple[str, int]) -> Tensor:
        """Return the hidden states of a name and batch, ``(B, T, D)``."""
        kept = self._kept.get(place)
        hidden: Tensor = torch.load(self._path(place)) if kept is None else kept
        return hidden if self._device is None else hidden.to(self._device)

    def __setitem__(self, place: tuple[str, int], hidden: Tensor) -> None:
        """Store hidden states, replacing earlier ones of the same name and batch."""
        hidden = hidden if self._device is None else hidden.cpu()
        earlier = self._kept.pop(place, None)
        self._bytes -= 0 if earlier is None else earlier.nbytes
        if self._bytes + hidden.nbytes <= self._limit:
            self._kept[place] = hidden
            self._bytes += hidden.nbytes
        else:
            path = self._path(place)
            try:
                torch.save(hidden, path)
            except (OSError, RuntimeError) as error:  # a full disk is either of them
                raise OutputError(
                    f"cannot write {path}: {first_line(error)}; set TMPDIR to a folder on a larger "
                    "disk"
                ) from error

    def forget(self, name: str) -> None:
        """Delete the hidden states of a name."""
        for place in [place for place in self._kept if place[0] == name]:
            self._bytes -= self._kept.pop(place).nbytes
        for path in self._folder.glob(f"{name}-*.pt"):
            path.unlink()

    def _path(self, place: tuple[str, int]) -> Path:
        name, batch = place
        return self._folder / f"{name}-{batch:06d}.pt"


class LayerRunner:
    """Runs one decoder layer of a model on given hidden states.

    The model itself calls the layer, with its own positions and masks; the other layers return
    their input, and the head is not computed.
    """

    def __init__(self, view: DecoderView) -> None:
        self._view = view
        self._lengths: dict[int, int] = {}

    @torch.no_grad()
    def inputs_of(
        self, index: int, batches: Mapping[int, Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each batch's number and the hidden states that enter a layer, ``(B, T, D)``."""
        layer = self._view.layer(index)
        found: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            found[:] = [hidden_input(args, kwargs).detach()]

        for number, batch in batches.items():
            with (
                self._running_up_to(index),
                layer.register_forward_pre_hook(keep, with_kwargs=True),
            ):
                self._call(batch)
            yield number, found.pop()

    @torch.no_grad()
    def states_around(
        self, first: int, last: int, batches: Mapping[int, Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each batch's number and the hidden states around a span of layers.

        Yields:
            Number, what enters layer ``first``, and what leaves layer ``last``, ``(B, T, D)``.
        """
        found: list[Tensor] = []

        # Copies: some families add to hidden states in place.
        def keep_input(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            found[:] = [hidden_input(args, kwargs).clone()]

        def keep_output(_module: nn.Module, _args: object, output: object) -> None:
            found.append(hidden_output(output).clone())

        start, end = self._view.layer(first), self._view.layer(last)
        for number, batch in batches.items():
            with (
                self._running_up_to(last + 1),
                start.register_forward_pre_hook(keep_input, with_kwargs=True),
                end.register_forward_hook(keep_output),
            ):
                self._call(batch)
            entering, leaving = found
            yield number, entering, leaving

    @contextmanager
    def _running_up_to(self, index: int) -> Iterator[None]:
        """Skip the layers from ``index`` on, after the first pass, and the head."""
        with self._without_head(), ExitStack() as stack:
            for other in self._view.layer_indices:
                module, note = self._view.layer(other), noting_length(self._lengths, other)
                if other >= index and other in self._lengths:  # its output is not needed
                    stack.enter_context(handing_through(module, self._lengths[other]))
                stack.enter_context(module.register_forward_hook(note))
            yield

    @contextmanager
    def differentiable(
        self, index: int, *, has_head: bool
    ) -> Iterator[Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]]:
        """Run one layer alone as ``only``, with autograd history.

        Args:
            index: Original number of the layer.
            has_head: Whether the head runs too, on what leaves the layer.

        Yields:
            A function that maps a batch and the hidden states that enter the layer to the leaf that
            the layer read, and to the logits if the head runs, else to what leaves the layer.
        """
        read: list[Tensor] = []

        def note(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            hidden = hidden_input(args, kwargs)
            # An observer may have put in a leaf of its own.
            leaf = hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)
            read[:] = [leaf]
            return with_hidden(leaf, args, kwargs)

        with (
            nullcontext() if has_head else self._without_head(),
            self._only(index, None) as run,
            self._view.layer(index).register_forward_pre_hook(note, with_kwargs=True),
        ):

            def call(batch: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
                logits: list[Tensor] = []
                leaving = run(hidden, lambda: logits.append(self._call(batch)))
                return read.pop(), logits.pop() if has_head else leaving

            yield call

    @contextmanager
    def only(
        self, first: int, last: int | None = None
    ) -> Iterator[Callable[[Mapping[str, Tensor], Tensor], Tensor]]:
        """Run one layer alone, or layers up to ``last``, during a ``with`` block.

        It needs an earlier pass over the model.

        Yields:
            A function that maps a batch and the hidden states that enter ``first``, ``(B, T, D)``,
            to those that leave the last layer, without autograd history.
        """
        with self._without_head(), self._only(first, last) as run:
            yield torch.no_grad()(lambda batch, hidden: run(hidden, partial(self._call, batch)))

    @contextmanager
    def with_weights(
        self, first: int, last: int | None = None
    ) -> Iterator[Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Tensor]]:
        """Run layers alone, as ``only``, with other values of their parameters.

        Yields:
            A function of a batch, the hidden states that enter ``first``, ``(B, T, D)``, and the
            values by the parameters' full names; it returns the hidden states that leave the last
            layer, with autograd history of the values.
        """
        with self._without_head(), self._only(first, last) as run:
            yield lambda batch, hidden, values: run(hidden, partial(self._call, batch, values))

    def _only(
        self, first: int, last: int | None
    ) -> AbstractContextManager[Callable[[Tensor, Callable[[], object]], Tensor]]:
        return only_layers(self._view, first, first if last is None else last, self._lengths)

    def _call(
        self, batch: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        device = self._view.model.device
        inputs = {key: value.to(device) for key, value in forward_inputs(batch).items()}
        if values is None:
            output = self._view.model(**inputs, use_cache=False)
        else:
            options = {**inputs, "use_cache": False}
            output = functional_call(self._view.model, dict(values), (), options)
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Skip the logits, which cost more than a layer if the vocabulary is large."""
        head = self._view.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None:
            yield
            return
        head.forward = lambda hidden: hidden[..., :1]
        try:
            yield
        finally:
            del head.forward


class Streams:
    """Hidden states of the dense and the compressed model for the windows of this process."""

    def __init__(self, view: DecoderView, data: CalibrationData, hidden: HiddenStates) -> None:
        self.runner = LayerRunner(view)
        self.hidden = hidden
        self._view = view
        self.batches = numbered_batches(data)

    def start(self, index: int, ends: Mapping[str, nn.Module] | None = None) -> None:
        """Store what enters a layer below which nothing is compressed.

        Args:
            index: Original number of the layer; with a compressed embedding the first one.
            ends: Compressed embedding and head, by the names of those they replace.
        """
        # Reading all layers below once per batch would take long.
        is_streamed = streamed_weights(self._view.model) is not None
        first = self._view.layer_indices[0] if is_streamed else index
        for number, entering in self.runner.inputs_of(first, self.batches):
            self.hidden[DENSE, number] = self.hidden[COMPRESSED, number] = entering
        for below in self._view.layer_indices:
            if first <= below < index:
                with holding(self._view.model, below, below + 1):
                    self.advance_dense(below)
        if first < index:
            for number in self.batches:
                self.hidden[COMPRESSED, number] = self.hidden[DENSE, number]
        if ends:
            with in_place_of_linears(self._view, ends):
                for number, entering in self.runner.inputs_of(index, self.batches):
                    self.hidden[COMPRESSED, number] = entering

    def advance_dense(self, index: int) -> None:
        """Move the hidden states of the dense model alone through a layer."""
        with self.runner.only(index) as run:
            for number, batch in self.batches.items():
                self.hidden[DENSE, number] = run(batch, self.hidden[DENSE, number])


def numbered_batches(data: CalibrationData) -> dict[int, dict[str, Tensor]]:
    """Return the batches of this process by number; one without windows is padding."""
    windows = data.windows
    return {
        number: windows.batch(rows) if rows else windows.padding()
        for number, rows in enumerate(data.batches)
    }
