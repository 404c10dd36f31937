"""Sweeps of hidden states through a model, one decoder layer after the other.

A decoder is a chain: a layer needs only what entered it, and on the way back the gradient of what
left it. So all windows pass one layer before the next one is loaded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.config import FisherChoice
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.perplexity import perplexity_of
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.next_token import on_device
from grasp_lightning.models.streamed import holding
from grasp_lightning.training.calibration import calibration_losses, check_loss
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner

Batches = Mapping[int, Mapping[str, Tensor]]
Track = Callable[[Sequence[str], str], Iterable[str]]
_GRADIENT = "gradient"


class Visitor(Protocol):
    """Sees each batch that runs through a layer."""

    def before(self, batch: Mapping[str, Tensor]) -> None:
        """Take the batch that runs next."""

    def after(self, batch: Mapping[str, Tensor]) -> None:
        """Take the batch that ran."""


Visit = Callable[[int], AbstractContextManager[Visitor]]


class _Unseen:
    """Ignores batches."""

    def before(self, batch: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def after(self, batch: Mapping[str, Tensor]) -> None:
        """Do nothing."""


@contextmanager
def unseen(index: int) -> Iterator[Visitor]:
    """Watch no batch of a layer."""
    del index
    yield _Unseen()


class LayerSweep:
    """The hidden states of some batches, moved through the decoder layers of a frozen model.

    Args:
        view: The model, frozen; usually a streamed one.
        batches: Batches by number.
        hidden: Where hidden states and gradients are kept.
        track: Shows progress over layers.
    """

    def __init__(
        self, view: DecoderView, batches: Batches, hidden: HiddenStates, track: Track
    ) -> None:
        self._view = view
        self._batches = batches
        self._hidden = hidden
        self._track = track
        self._runner = LayerRunner(view)

    def entering(self, index: int, number: int) -> Tensor:
        """Return what enters a layer in a batch, ``(B, T, D)``."""
        return self._hidden[str(index), number]

    def up(
        self,
        description: str,
        *,
        until: int | None = None,
        num_kept: int = 1,
        kept_from: int | None = None,
        visit: Visit | None = None,
        passed: Callable[[int, int, Tensor], None] | None = None,
    ) -> None:
        """Run the layers from the first one up, without gradients and without the head.

        Args:
            description: Label of the progress.
            until: The first layer that does not run, whose input is kept; None runs all.
            num_kept: Number of layers whose inputs are kept at a time.
            kept_from: Lowest layer whose input is kept in any case; None: none.
            visit: Opened for each layer; sees its batches.
            passed: Called with the layer, the number of the batch and what left the layer.
        """
        first = self._view.layer_indices[0]
        for number, entering in self._runner.inputs_of(first, self._batches):
            self._hidden[str(first), number] = entering
        layers = [i for i in self._view.layer_indices if until is None or i < until]
        following = dict(pairwise(self._view.layer_indices))
        for position, name in enumerate(self._track([str(i) for i in layers], description)):
            index = int(name)
            after = None if index == layers[-1] else following[index]
            with holding(self._view.model, index, after):
                self._run(index, following.get(index), visit, passed)
            if position + 1 >= num_kept:
                old = layers[position + 1 - num_kept]
                if kept_from is None or old < kept_from:
                    self._hidden.forget(str(old))

    def _run(
        self,
        index: int,
        following: int | None,
        visit: Visit | None,
        passed: Callable[[int, int, Tensor], None] | None,
    ) -> None:
        with (
            (visit or unseen)(index) as visitor,
            self._runner.only(index) as run,
        ):
            for number, batch in self._batches.items():
                # A copy: some families add to hidden states in place.
                entering = self.entering(index, number).clone()
                visitor.before(batch)
                leaving = run(batch, entering)
                visitor.after(batch)
                if following is not None:
                    self._hidden[str(following), number] = leaving
                if passed is not None:
                    passed(index, number, leaving)

    def down(self, description: str, lowest: int, fisher: FisherChoice, visit: Visit) -> None:
        """Run the layers from the last one down to ``lowest``, each forward and backward.

        The inputs of these layers must be kept. The last layer runs with the head and the loss;
        every other one gets the gradient of what left it.

        Args:
            description: Label of the progress.
            lowest: The lowest layer.
            fisher: Which gradients, as in ``CalibrationModule``.
            visit: Opened for each layer; sees its batches.
        """
        layers = [i for i in reversed(self._view.layer_indices) if i >= lowest]
        following = dict(pairwise(layers))
        for name in self._track([str(i) for i in layers], description):
            index = int(name)
            is_last = index == layers[0]
            with (
                holding(self._view.model, index, following.get(index)),
                visit(index) as visitor,
                self._runner.differentiable(index, has_head=is_last) as run,
            ):
                for number, batch in self._batches.items():
                    entering = self.entering(index, number).clone()
                    visitor.before(batch)
                    with torch.enable_grad():
                        leaf, result = run(batch, entering)
                        self._backward(result, number, batch, fisher if is_last else None)
                    visitor.after(batch)
                    assert leaf.grad is not None  # every layer passes on a residual stream
                    self._hidden[_GRADIENT, number] = leaf.grad
            self._hidden.forget(str(index))
        self._hidden.forget(_GRADIENT)

    def predictions(self, description: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield each batch on the device and its logits, ``(B, T, V)``, without gradients."""
        last = self._view.layer_indices[-1]
        self.up(description, until=last)
        with (
            holding(self._view.model, last),
            self._runner.differentiable(last, has_head=True) as run,
        ):
            for number, batch in self._batches.items():
                with torch.no_grad():
                    _, logits = run(batch, self.entering(last, number).clone())
                yield on_device(batch, logits.device), logits

    def _backward(
        self, result: Tensor, number: int, batch: Mapping[str, Tensor], fisher: FisherChoice | None
    ) -> None:
        """Run backward from logits if ``fisher`` is given, else from what left a layer."""
        if fisher is None:
            result.backward(self._hidden[_GRADIENT, number])  # type: ignore[no-untyped-call]  # untyped in torch
            return
        moved = on_device(batch, result.device)
        loss = calibration_losses(fisher, result, moved).sum()
        check_loss(self._view, moved, number, loss)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch


def sweep_perplexity(
    view: DecoderView,
    windows: TokenWindows,
    batch_size: int,
    *,
    max_bytes: float,
    track: Track,
    description: str,
) -> float:
    """Return the perplexity on held-out windows, which pass the model layer by layer.

    The processes share the windows, and all get the perplexity of all windows.

    Args:
        view: The model, usually a streamed one.
        windows: Held-out windows.
        batch_size: Windows per forward pass of a layer.
        max_bytes: Memory for hidden states of this process; the rest is stored in files.
        track: Shows progress over layers.
        description: Label of the progress.
    """
    shares = processes.own_batches(range(len(windows)), batch_size)
    own = [windows.batch(rows) for rows, counts in shares if counts]
    if not own:  # there are more processes than windows
        return perplexity_of(view, ())
    batches = dict(enumerate(own))
    with _predicted(view, batches, max_bytes, track, description) as predictions:
        return perplexity_of(view, predictions)


def sweep_logits(
    view: DecoderView,
    inputs: Sequence[Tensor],
    *,
    max_bytes: float,
    track: Track,
    description: str,
) -> Iterator[Tensor]:
    """Yield the logits of batches of token ids, which pass the model layer by layer.

    Args:
        view: The model, usually a streamed one.
        inputs: Batches of token ids, each ``(B, T)``, without padding that must be masked.
        max_bytes: Memory for hidden states; the rest is stored in files.
        track: Shows progress over layers.
        description: Label of the progress.

    Yields:
        ``(B, T, V)`` for each batch.
    """
    batches = {
        number: {"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
        for number, ids in enumerate(inputs)
    }
    with _predicted(view, batches, max_bytes, track, description) as predictions:
        for _, logits in predictions:
            yield logits


@contextmanager
def _predicted(
    view: DecoderView, batches: Batches, max_bytes: float, track: Track, description: str
) -> Iterator[Iterator[tuple[dict[str, Tensor], Tensor]]]:
    """Provide batches and their logits during a ``with`` block."""
    with TemporaryDirectory() as folder, frozen(view.model):
        hidden = HiddenStates(Path(folder), max_bytes, view.model.device)
        yield LayerSweep(view, batches, hidden, track).predictions(description)
