"""Sizes of a model in parameters and bytes."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.integrity import plain_parts
from grasp_lightning.models.lowrank import dense_shape, low_rank_linears, narrowed_linears, seams
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.sliced import shortcuts


class LinearShape(NamedTuple):
    """A linear of a decoder layer; rows are its outputs, columns its inputs.

    Attributes:
        rank: Rank of its factors; None if it is dense.
        is_narrowed: Whether compression removed inputs or outputs.
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
        """Whether compression has replaced it."""
        return self.rank is not None or self.is_narrowed

    @property
    def parameters(self) -> int:
        """Number of weights, or of weights in both factors."""
        if self.rank is None:
            return self.rows * self.columns
        return self.rank * (self.rows + self.columns)

    @property
    def matrices(self) -> "tuple[LinearShape, ...]":
        """The matrices that its input is multiplied by, in order."""
        if self.rank is None:
            return (self,)
        return (LinearShape(self.rank, self.columns), LinearShape(self.rows, self.rank))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Sizes of a model at one dtype; tied parameters are counted once.

    Attributes:
        decoder_linear_parameters: Those in dense, low-rank and narrowed linears, seams and
            shortcuts of decoder layers, with biases, without mixtures of experts.
    """

    parameters: int
    decoder_linear_parameters: int
    bytes: int
    decoder_linear_bytes: int


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once; works on the meta device."""
    return sum(_num_values(parameter) for parameter in model.parameters())


def _num_values(parameter: Tensor) -> int:
    # bitsandbytes packs two weights into one value of a parameter.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def count_bytes(model: nn.Module, element_size: int | None = None) -> int:
    """Return the bytes of all parameters, with the scales of quantized ones; tied ones count once.

    Args:
        model: Any module; the meta device works too.
        element_size: Bytes per parameter that is not quantized; None takes its own dtype.
    """
    return sum(_num_bytes(parameter, element_size) for parameter in model.parameters())


def _num_bytes(parameter: Tensor, element_size: int | None) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(parameter.nbytes + state.absmax.nbytes)
    parts = plain_parts(parameter)
    if parts[0] is not parameter:
        return sum(part.nbytes for part in parts)
    return parameter.numel() * (element_size or parameter.element_size())


def count_tied_parameters(model: nn.Module) -> int:
    """Return the number of parameters that several modules share, each counted once."""
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return sum(p.numel() for p in model.parameters() if uses[id(p)] > 1)


def count_decoder_linears(view: DecoderView) -> int:
    """Return the number of parameters in linears of decoder layers, tied ones counted once.

    Dense, low-rank and narrowed linears count with their biases, seams and shortcuts; experts
    and routers do not.
    """
    return count_parameters(_decoder_linears(view))


def _decoder_linears(view: DecoderView) -> nn.Module:
    linears: list[nn.Module] = []
    for index in view.layer_indices:
        linears += view.dense_modules(index).values()
        linears += low_rank_linears(view.layer(index)).values()
        linears += narrowed_linears(view.layer(index)).values()
        linears += seams(view.layer(index)).values()
        linears += shortcuts(view.layer(index)).values()
    return nn.ModuleList(linears)


def count_inputs(view: DecoderView) -> dict[str, int]:
    """Return the number of inputs of every dense linear in decoder layers, by original name.

    Experts with stacked weights count as one linear, which reads the channels of one expert.
    """
    found: dict[str, int] = {}
    for index in view.layer_indices:
        linears = view.dense_modules(index).items()
        found |= {name: dense_shape(module)[1] for name, module in linears}
        found |= {name: layout.width for name, layout in experts_in(view, index).items()}
    return found


def measure_size(view: DecoderView, element_size: int | None = None) -> ModelSize:
    """Return the size of a model; sizes in bytes compare only at an equal element size.

    Args:
        view: The model.
        element_size: Bytes per parameter that is not quantized; None takes the model's dtype.
    """
    size = view.model.dtype.itemsize if element_size is None else element_size
    linears = _decoder_linears(view)
    return ModelSize(
        parameters=count_parameters(view.model),
        decoder_linear_parameters=count_parameters(linears),
        bytes=count_bytes(view.model, size),
        decoder_linear_bytes=count_bytes(linears, size),
    )
