"""Linear maps for the hidden states where decoder layers are deleted.

Legend: X what a map reads and D what the deleted layers add to the hidden states, one row per real
token of the calibration text; C hidden size of the model.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.regression import pulled_regression
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import AddSeam
from grasp_lightning.stats.base import SeamSums

SEAM: Final = "seam"
RIDGE: Final = 1e-8
_MOST_RIDGE = 100.0


def checked_ridge(config: MethodConfig) -> float:
    """Return the ridge, or the default; one out of range is a ``ConfigError``."""
    ridge = RIDGE if config.ridge is None else config.ridge
    if not 0 <= ridge <= _MOST_RIDGE:
        raise ConfigError(f"method.ridge must be from 0 to {_MOST_RIDGE:g}, got {ridge}")
    return ridge


def seam_weight(sums: SeamSums, ridge: float) -> Tensor:
    """Return the linear map that best adds to the hidden states what the layers added.

    Its weight is ``A``, with ``A^T = (X^T X + rho I)^-1 X^T D``: it minimises
    ``|D - X A^T|^2 + rho |A|^2``. Where the text says nothing, it adds nothing, as after plain
    deletion.

    Args:
        sums: Sums of a run of layers.
        ridge: ``rho``, as a share of the mean diagonal of ``X^T X``.

    Returns:
        ``A``, ``(C, C)``, float64, on the CPU.
    """
    prior = torch.zeros_like(sums.gram, dtype=torch.float64)
    return pulled_regression(sums.cross, sums.gram, prior, pull=0.0, ridge=ridge).cpu()


def seam_size(view: DecoderView) -> int:
    """Return the number of parameters of a seam."""
    return int(view.model.config.get_text_config().hidden_size) ** 2


def runs_of(layers: Sequence[int], remaining: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the maximal runs of layers without a remaining layer in between, in order.

    Args:
        layers: Layers to delete.
        remaining: All layers of the model before the deletion, ascending.
    """
    runs: list[tuple[int, ...]] = []
    is_open = False
    for index in remaining:
        if index not in layers:
            is_open = False
        elif is_open:
            runs[-1] += (index,)
        else:
            runs.append((index,))
            is_open = True
    return runs


def seam_operations(view: DecoderView, layers: Sequence[int]) -> Iterator[AddSeam]:
    """Yield one seam for each run of layers to delete, held by the layer that follows it.

    If none follows, the last remaining layer holds it.
    """
    remaining = [index for index in view.layer_indices if index not in layers]
    for run in runs_of(layers, view.layer_indices):
        later = [index for index in remaining if index > run[-1]]
        holder = later[0] if later else remaining[-1]
        yield AddSeam(layers=run, holder=holder, is_after=not later)
