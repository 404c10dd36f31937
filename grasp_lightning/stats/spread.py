"""Means and variances of the inputs of linears.

Legend: T tokens of a window, M input features of a linear.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grasp_lightning.errors import NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Spread, check_seen
from grasp_lightning.stats.observer import InputObserver

_NUM_TOKENS = "num_tokens"


class SpreadCollector:
    """Sums the inputs of some linears and their squares in float64, window by window.

    Args:
        modules: Full names of the linears.
    """

    def __init__(self, view: DecoderView, modules: Sequence[str]) -> None:
        self._modules = tuple(modules)
        self._observer = InputObserver(view, self._modules, self._add)
        self._mask: Tensor | None = None
        self._rows = dict.fromkeys(modules, 0)
        self._num_windows = dict.fromkeys(modules, 0)
        sizes = {n: x.in_features for n, x in view.all_linears().items() if n in self._num_windows}
        self._sums = {_NUM_TOKENS: torch.tensor(0.0, dtype=torch.float64)}
        for name in self._modules:
            zeros = torch.zeros(sizes[name], dtype=torch.float64, device=view.model.device)
            self._sums |= {f"{name}.sum": zeros, f"{name}.squares": zeros.clone()}

    def start_batch(self, mask: Tensor) -> None:
        """Set the mask of the next forward pass, True for real tokens, ``(B, T)``."""
        self._mask = mask.bool()
        self._rows = dict.fromkeys(self._modules, 0)
        self._sums[_NUM_TOKENS] += self._mask.sum().cpu()

    def _add(self, module: str, x: Tensor) -> None:
        if self._mask is None:
            raise RuntimeError("start_batch must be called before each forward pass")
        row, self._rows[module] = self._rows[module], self._rows[module] + 1
        self._num_windows[module] += 1
        real = x[self._mask[row].nonzero().squeeze(1).to(x.device)].double()
        self._sums[f"{module}.sum"] += real.sum(dim=0)
        self._sums[f"{module}.squares"] += real.square().sum(dim=0)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model during a ``with`` block."""
        with self._observer.attached():
            yield

    def check_seen(self) -> None:
        """Raise ``ModelError`` for a linear that was called less often than others."""
        check_seen(self._num_windows, "its inputs cannot be measured")

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {name: value.cpu().clone() for name, value in self._sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        self._sums = {name: state[name].to(value) for name, value in self._sums.items()}

    def spreads(self) -> dict[str, Spread]:
        """Return mean and sample variance of the inputs of each linear, on the CPU.

        Raises:
            NumericsError: If one is NaN or infinite.
        """
        count = float(self._sums[_NUM_TOKENS])
        found = {}
        for name in self._modules:
            mean = self._sums[f"{name}.sum"].cpu() / count
            squares = self._sums[f"{name}.squares"].cpu()
            variance = (squares - count * mean.square()).clamp(min=0) / max(count - 1, 1)
            if not (mean.isfinite().all() and variance.isfinite().all()):
                raise NumericsError(
                    f"inputs of {name} are NaN or infinite; check the checkpoint, or set "
                    "model.dtype to float32 if it is narrower"
                )
            found[name] = Spread(mean=mean, variance=variance)
        return found
