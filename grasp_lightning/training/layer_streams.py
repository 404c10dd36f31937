"""Hidden states that go through a model one decoder layer at a time.

Legend: B windows of T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.training.hidden_cache import handing_through, with_hidden

DENSE, COMPRESSED = "dense", "compressed"


class HiddenStates:
    """Hidden states by name and batch, in memory up to a limit and on disk beyond it.

    Args:
        folder: Where files go; it must be there.
        limit: Bytes that may be in memory.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self._folder = folder
        self._limit = limit
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._bytes = 0

    def __getitem__(self, place: tuple[str, int]) -> Tensor:
        """Return the hidden states of a name and batch, ``(B, T, D)``."""
        kept = self._kept.get(place)
        return torch.load(self._path(place)) if kept is None else kept

    def __setitem__(self, place: tuple[str, int], hidden: Tensor) -> None:
        """Keep hidden states in place of earlier ones of the same name and batch."""
        earlier = self._kept.pop(place, None)
        self._bytes -= 0 if earlier is None else earlier.nbytes
        if self._bytes + hidden.nbytes <= self._limit:
            self._kept[place] = hidden
            self._bytes += hidden.nbytes
        else:
            torch.save(hidden, self._path(place))

    def _path(self, place: tuple[str, int]) -> Path:
        name, batch = place
        return self._folder / f"{name}-{batch:06d}.pt"


class LayerRunner:
    """Runs a model so that one of its decoder layers sees hidden states of the caller's choice.

    The model calls its layers itself, with the positions and masks of its family; the other layers
    hand their input through, and the head is not computed.

    Args:
        view: The model.
    """

    def __init__(self, view: DecoderView) -> None:
        self._view = view
        self._lengths: dict[int, int] = {}

    @torch.no_grad()
    def inputs_of(
        self, index: int, batches: Mapping[int, Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield what enters a layer when the model runs as it is.

        Args:
            index: The layer's number in the original model.
            batches: Batches of windows, by number.

        Yields:
            Number of a batch, and the hidden states, ``(B, T, D)``.
        """
        layer = self._view.layer(index)
        for number, batch in batches.items():
            found: list[Tensor] = []

            def keep(
                module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
            ) -> None:
                del module
                found.append(hidden_input(args, kwargs).detach())  # noqa: B023  called at once

            with ExitStack() as stack:
                stack.enter_context(self._without_head())
                for other in self._view.layer_indices:
                    module = self._view.layer(other)
                    if other >= index and other in self._lengths:  # nothing above it is asked for
                        stack.enter_context(handing_through(module, self._lengths[other]))
                    stack.callback(module.register_forward_hook(self._note(other)).remove)
                handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(handle.remove)
                self._call(batch)
            yield number, found[0]

    @contextmanager
    def only(self, index: int) -> Iterator[Callable[[Mapping[str, Tensor], Tensor], Tensor]]:
        """Run one layer alone during a ``with`` block; ``inputs_of`` must have run before.

        Args:
            index: The layer's number in the original model.

        Yields:
            A function of a batch and of the hidden states that enter the layer, ``(B, T, D)``, that
            returns those that leave it, without autograd history.
        """
        layer = self._view.layer(index)
        entering: list[Tensor] = []
        leaving: list[Tensor] = []

        def take(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            del module
            return with_hidden(entering[-1], args, kwargs)

        def note(module: nn.Module, args: object, output: object) -> None:
            del module, args
            leaving.append(hidden_output(output).detach())

        @torch.no_grad()
        def run(batch: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
            entering[:] = [hidden]
            leaving.clear()
            self._call(batch)
            return leaving.pop()

        with ExitStack() as stack:
            stack.enter_context(self._without_head())
            for other in self._view.layer_indices:
                if other != index:
                    module = self._view.layer(other)
                    stack.enter_context(handing_through(module, self._lengths[other]))
            handle = layer.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            stack.callback(layer.register_forward_hook(note).remove)
            yield run

    def _call(self, batch: Mapping[str, Tensor]) -> None:
        device = self._view.model.device
        inputs = {key: value.to(device) for key, value in forward_inputs(batch).items()}
        self._view.model(**inputs, use_cache=False)

    def _note(self, index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: object, output: object) -> None:
            del module, args
            # 0 stands for a bare tensor.
            self._lengths[index] = len(output) if isinstance(output, tuple) else 0

        return note

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Compute no logits, which take longer than a layer where the vocabulary is large."""
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
    """Hidden states of the dense and of the compressed model, for the windows of this process."""

    def __init__(self, view: DecoderView, data: CalibrationData, hidden: HiddenStates) -> None:
        self.runner = LayerRunner(view)
        self.hidden = hidden
        windows = data.windows
        self.batches: dict[int, dict[str, Tensor]] = {
            number: windows.batch(rows) if rows else windows.padding()
            for number, rows in enumerate(data.batches)
        }

    def start(self, index: int) -> None:
        """Take what enters a layer below which nothing is compressed."""
        for number, entering in self.runner.inputs_of(index, self.batches):
            self.hidden[DENSE, number] = self.hidden[COMPRESSED, number] = entering

    def advance_dense(self, index: int) -> None:
        """Let the hidden states of the dense model alone pass through a layer."""
        with self.runner.only(index) as run:
            for number, batch in self.batches.items():
                self.hidden[DENSE, number] = run(batch, self.hidden[DENSE, number])
