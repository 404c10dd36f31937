"""Sizes of a model in parameters and bytes."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import dense_shape, low_rank_linears, narrowed_linears


class LinearShape(NamedTuple):
    """A linear of a decoder layer.

    Attributes:
        rows: Number of output features.
        columns: Number of input features.
        rank: Rank of its factors; None if it is dense.
        is_narrowed: Whether it has lost inputs or outputs: compression has replaced it, too.
    """

    rows: int
    columns: int
    rank: int | None = None
    is_narrowed: bool = False

    @property
    def num_components(self) -> int:
        """K = min(N, M)."""
        return min(self.rows, self.columns)

    @property
    def is_replaced(self) -> bool:
        """Whether it is not what it was before compression."""
        return self.rank is not None or self.is_narrowed

    @property
    def parameters(self) -> int:
        """Number of its weights, or of those of its factors."""
        if self.rank is None:
            return self.rows * self.columns
        return self.rank * (self.rows + self.columns)

    @property
    def matrices(self) -> "tuple[LinearShape, ...]":
        """The dense matrices that it multiplies with, in order."""
        if self.rank is None:
            return (self,)
        return (LinearShape(self.rank, self.columns), LinearShape(self.rows, self.rank))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """How large a model is, as a whole and in the linears of its decoder layers.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        decoder_linear_parameters: Those of the linears in decoder layers, dense, low-rank
            and narrowed, biases included; without what belongs to a mixture of experts.
        bytes: Size of all parameters at one dtype.
        decoder_linear_bytes: Size of those of the linears in decoder layers, at the same dtype.
    """

    parameters: int
    decoder_linear_parameters: int
    bytes: int
    decoder_linear_bytes: int


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once; the meta device will do."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_tied_parameters(model: nn.Module) -> int:
    """Return the number of parameters that several modules share, each counted once."""
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return sum(p.numel() for p in model.parameters() if uses[id(p)] > 1)


def count_decoder_linears(view: DecoderView) -> int:
    """Return the number of parameters in linears of decoder layers, tied ones counted once.

    The factors of low-rank linears are linears too, and so are narrowed ones. Biases count;
    experts and routers do not.
    """
    linears: list[nn.Module] = []
    for index in view.layer_indices:
        linears += view.dense_modules(index).values()
        linears += low_rank_linears(view.layer(index)).values()
        linears += narrowed_linears(view.layer(index)).values()
    return count_parameters(nn.ModuleList(linears))


def count_inputs(view: DecoderView) -> dict[str, int]:
    """Return the number of inputs of every dense linear in decoder layers, by original name."""
    return {
        name: dense_shape(module)[1]
        for index in view.layer_indices
        for name, module in view.dense_modules(index).items()
    }


def measure_size(view: DecoderView, element_size: int | None = None) -> ModelSize:
    """Return the size of a model, with bytes at one dtype for all parameters.

    Args:
        view: The model.
        element_size: Bytes per parameter; None takes the model's dtype. Two models are comparable
            in bytes only at an equal element size.

    Returns:
        The size.
    """
    size = view.model.dtype.itemsize if element_size is None else element_size
    parameters = count_parameters(view.model)
    linears = count_decoder_linears(view)
    return ModelSize(
        parameters=parameters,
        decoder_linear_parameters=linears,
        bytes=parameters * size,
        decoder_linear_bytes=linears * size,
    )
