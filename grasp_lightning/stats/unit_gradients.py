"""Importance of MLP channels and key/value groups by the gradients of their weights.

Legend: T tokens of a window, N output and M input features of a linear; U units of a block.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from grasp_lightning.config import Grouping, Importance
from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.precision import full_precision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import whole
from grasp_lightning.models.units import Units
from grasp_lightning.stats.base import check_seen
from grasp_lightning.stats.moments import groups_within
from grasp_lightning.stats.observer import LinearObserver

_WEIGHT, _BIAS, _SQUARES = "weight", "bias", ".squares"
_NUM_WINDOWS = "num_windows"


class UnitGradients:
    """Sums the gradients of the weights in units over windows, or their squares, or both.

    Biases of the linears that write units count, too. Gradients are summed with their sign. Squares
    are taken of the gradient of each window's mean loss over its predicted tokens.

    Args:
        units: The units of some blocks.
        importance: What is to be computed from the sums.
        grouping: Which units the importance of query heads counts for.
    """

    def __init__(
        self,
        view: DecoderView,
        units: Sequence[Units],
        importance: Importance,
        grouping: Grouping = "heads",
    ) -> None:
        self._view = view
        self._units = units
        self._importance = importance
        self._grouping = grouping
        self._names = tuple(name for found in units for name in found.linears)
        self._num_windows = dict.fromkeys(self._names, 0)
        self._rows = dict.fromkeys(self._names, 0)
        self._num_targets = torch.zeros(0)
        self.sums: dict[str, Tensor] = {_NUM_WINDOWS: torch.tensor(0.0)}
        for name in self._names:
            for key, parameter in _parameters(view, units, name).items():
                zeros = torch.zeros(parameter.shape, device=view.model.device)
                if importance != "taylor_second":
                    self.sums[f"{name}.{key}"] = zeros
                if importance != "taylor":
                    self.sums[f"{name}.{key}{_SQUARES}"] = zeros.clone()
        self.observer = LinearObserver(view, self._names, self.add)

    def start_batch(self, targets: Tensor) -> None:
        """Announce the predicted tokens of the next batch, ``(B, T)``."""
        self._num_targets = targets[:, 1:].sum(dim=1)
        self._rows = dict.fromkeys(self._names, 0)
        self.sums[_NUM_WINDOWS] += (self._num_targets > 0).sum().cpu()

    def add(self, module: str, x: Tensor, grad_output: Tensor) -> None:
        """Add one window of a linear: input ``(T, M)``, gradient of its output ``(T, N)``."""
        row, self._rows[module] = self._rows[module], self._rows[module] + 1
        self._num_windows[module] += 1
        num_targets = float(self._num_targets[row])
        if num_targets == 0:  # padding
            return
        with full_precision(x.device):
            gradients = {_WEIGHT: grad_output.float().mT @ x.float()}
        gradients[_BIAS] = grad_output.float().sum(dim=0)
        for key, gradient in gradients.items():
            total = self.sums.get(f"{module}.{key}")
            squares = self.sums.get(f"{module}.{key}{_SQUARES}")
            if total is not None:
                total += gradient
            if squares is not None:
                squares += (gradient / num_targets).square()

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far, on the CPU."""
        return {name: value.cpu().clone() for name, value in self.sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        self.sums = {name: state[name].to(value) for name, value in self.sums.items()}

    def check_seen(self) -> None:
        """Raise ``ModelError`` for a linear that was called less often than others."""
        check_seen(self._num_windows, "its units cannot be scored")

    def scores(self, num_targets: int) -> dict[str, Tensor]:
        """Return the importance of each unit by the reader of its block, float64, ``(U,)``.

        Args:
            num_targets: Number of predicted tokens in all windows.

        Raises:
            NumericsError: If one is NaN or infinite.
        """
        num_windows = max(float(self.sums.pop(_NUM_WINDOWS)), 1.0)
        for name, value in self.sums.items():
            value.div_(num_windows if name.endswith(_SQUARES) else num_targets)
        found = {}
        for units in self._units:
            scores = unit_importance(self._view, units, self._importance, self.sums, self._grouping)
            if not scores.isfinite().all():
                raise NumericsError(
                    f"the gradients of the units that {units.reader} reads are NaN or infinite; "
                    "check the checkpoint, or compute in float32 (model.dtype, trainer.precision) "
                    "if it is narrower"
                )
            found[units.reader] = scores
        return found


def unit_importance(
    view: DecoderView,
    units: Units,
    importance: Importance,
    gradients: Mapping[str, Tensor],
    grouping: Grouping = "heads",
) -> Tensor:
    """Return the sum of the importance of all weights in each unit of a block, float64, ``(U,)``.

    Args:
        gradients: Gradients ``<module>.<parameter>``, and squared ones with ``.squares`` after
            it; none for ``l2``.
        grouping: ``released``: query head i counts for unit i modulo U.
    """
    total = torch.zeros(units.number, dtype=torch.float64)
    for name in units.linears:
        for key, parameter in _parameters(view, [units], name).items():
            value = whole(parameter.detach()).float()
            full = f"{name}.{key}"
            found = _importance(
                importance, value, gradients.get(full), gradients.get(f"{full}{_SQUARES}")
            )
            total += _unit_sums(units, name, found, grouping)
    return total


def _importance(
    importance: Importance, weight: Tensor, gradient: Tensor | None, squares: Tensor | None
) -> Tensor:
    """Return the importance of each weight w; see ``LlmPruner`` for the formulas."""
    square = weight.square()
    if importance == "l2":
        return square
    first = None if gradient is None else weight * gradient
    second = None if squares is None else square * squares
    if first is None:
        assert second is not None  # what taylor_second needs
        return second
    return first.abs() if second is None else (first - second / 2).abs()


def _unit_sums(units: Units, name: str, values: Tensor, grouping: Grouping) -> Tensor:
    """Return the sums of values like a weight or bias over each unit, float64, ``(U,)``."""
    if name == units.reader:
        found = values.sum(dim=0, dtype=torch.float64).cpu()
        sizes: tuple[int, ...] = (units.width,)
    else:
        found = values.reshape(len(values), -1).sum(dim=1, dtype=torch.float64).cpu()
        sizes = units.parts[units.writers.index(name)]
    sums = torch.zeros(units.number, dtype=torch.float64)
    head = min(min(part) for part in units.parts)
    for part, size in zip(
        torch.split(found, [n * units.number for n in sizes]), sizes, strict=True
    ):
        if grouping == "released" and units.are_heads:
            sums += part.reshape(size // head, units.number, head).sum(dim=(0, 2))
        else:
            sums += part.reshape(units.number, size).sum(dim=1)
    return sums


def _parameters(view: DecoderView, units: Iterable[Units], name: str) -> dict[str, Tensor]:
    """Return weight and bias of a linear; a bias of a reader belongs to no unit."""
    index = view.layer_of(name)
    assert index is not None  # all units are in decoder layers
    linear = view.linears(index)[name]
    is_reader = any(name == found.reader for found in units)
    if linear.bias is None or is_reader:
        return {_WEIGHT: linear.weight}
    return {_WEIGHT: linear.weight, _BIAS: linear.bias}


def unit_groups(
    view: DecoderView, units: Sequence[Units], importance: Importance, max_bytes: float
) -> list[tuple[Units, ...]]:
    """Group the units of whole layers whose summed gradients, in float32, fit into memory.

    Args:
        max_bytes: Memory for the sums of a group; a single layer may take more.
    """
    layers: dict[int, list[Units]] = {}
    for found in units:
        layers.setdefault(view.layer_of(found.reader) or 0, []).append(found)
    copies = 2 if importance == "taylor_mixed" else 1
    sizes = {
        index: 4 * copies * sum(block.size * block.number for block in blocks)
        for index, blocks in layers.items()
    }
    groups = groups_within(sizes, max_bytes)
    return [tuple(block for index in group for block in layers[index]) for group in groups]
