"""Counts the forward passes of a measurement."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView


class PassCounter:
    """Counts the windows that each decoder layer works on.

    A layer that returns its input unchanged, because a pass starts above it, does not count.

    Args:
        view: The model, with all its layers.
    """

    def __init__(self, view: DecoderView) -> None:
        self._layers = [view.layer(index) for index in view.layer_indices]
        self.counts = [0] * len(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Count for the duration of a ``with`` block."""
        with ExitStack() as stack:
            for position, layer in enumerate(self._layers):
                hook = partial(self._count, position)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _count(
        self,
        position: int,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        del module
        entering = hidden_input(args, kwargs)
        if hidden_output(output) is not entering:
            self.counts[position] += entering.shape[0]
