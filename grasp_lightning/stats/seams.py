"""Sums for linear maps that replace decoder layers, over the real tokens of a pass.

Legend: C hidden size of the model, T real tokens of a window, X ``(T, C)`` what the map reads,
D ``(T, C)`` what the layers add to the hidden states.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from grasp_lightning.errors import NumericsError
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Seam, SeamSums

_Args = tuple[object, ...]
_Kwargs = dict[str, object]


class SeamCollector:
    """Sums ``X^T X`` and ``D^T X`` of several runs of layers in float64, window by window.

    All sums come from one forward pass, and do not depend on the batch size.

    Args:
        seams: Runs of layers, and what their maps read.
    """

    def __init__(self, view: DecoderView, seams: Sequence[Seam]) -> None:
        self._view = view
        self._seams = seams
        size = view.model.config.get_text_config().hidden_size
        empty = torch.zeros(size, size, dtype=torch.float64, device=view.model.device)
        self._sums = [SeamSums(gram=empty.clone(), cross=empty.clone()) for _ in seams]
        self._mask: Tensor | None = None
        self._entering: dict[int, Tensor] = {}
        self._read: dict[int, Tensor] = {}

    def start_batch(self, mask: Tensor) -> None:
        """Set the mask of the next forward pass, True for real tokens, ``(B, T)``."""
        self._mask = mask

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {
            f"{number}.{name}": value.cpu().clone()
            for number, sums in enumerate(self._sums)
            for name, value in sums._asdict().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        for number, sums in enumerate(self._sums):
            for name, value in sums._asdict().items():
                value.copy_(state[f"{number}.{name}"])

    def sums(self) -> dict[Seam, SeamSums]:
        """Return the sums of each run of layers.

        Raises:
            NumericsError: If one is NaN or infinite.
        """
        for seam, sums in zip(self._seams, self._sums, strict=True):
            if not all(value.isfinite().all() for value in sums):
                raise NumericsError(
                    f"hidden states at layers {list(seam.layers)} are NaN or infinite; check the "
                    "checkpoint, or set model.dtype to float32 if it is narrower"
                )
        return dict(zip(self._seams, self._sums, strict=True))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model during a ``with`` block."""
        with ExitStack() as stack:
            for number, seam in enumerate(self._seams):
                first, last = (self._view.layer(seam.layers[at]) for at in (0, -1))
                enter, leave = partial(self._enter, number), partial(self._leave, number)
                stack.enter_context(first.register_forward_pre_hook(enter, with_kwargs=True))
                if seam.source is not None:
                    hook = partial(self._note, number)
                    source = self._view.module(seam.source)
                    stack.enter_context(source.register_forward_hook(hook))
                stack.enter_context(last.register_forward_hook(leave))
            yield

    def _note(self, number: int, _: nn.Module, _args: _Args, output: Tensor) -> None:
        self._read[number] = output.detach()

    def _enter(self, number: int, _: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        self._entering[number] = hidden_input(args, kwargs).detach()

    def _leave(self, number: int, _: nn.Module, _args: _Args, output: object) -> None:
        if self._mask is None:
            raise RuntimeError("start_batch must be called before each forward pass")
        entering = self._entering.pop(number)
        # Some families flatten (B, T, C) to (B * T, C) before a linear.
        read = self._read.pop(number, entering).reshape(entering.shape)
        leaving, sums = hidden_output(output).detach(), self._sums[number]
        for before, after, x, is_real in zip(entering, leaving, read, self._mask, strict=True):
            rows = is_real.nonzero().squeeze(1).to(x.device)
            x_TC = x[rows].double()
            added_TC = after[rows].double() - before[rows].double()
            sums.gram.addmm_(x_TC.mT, x_TC)
            sums.cross.addmm_(added_TC.mT, x_TC)
