"""What a model costs: parameters, bytes, and operations per token."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.size import measure_size


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Size and work of one model.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        decoder_linear_parameters: Those of the linears in decoder layers.
        bytes: Size of all parameters at the dtype of the model.
        decoder_linear_bytes: Size of those of the linears in decoder layers.
        flops_per_token: Floating point operations of the matrix products for one token without
            context, language-model head included: a multiplication and an addition count as two.
            Attention to a context comes on top, and is the same for every model of one shape.
        disk_bytes: Size of the weight files; None if unknown.
        dtype: Floating point type of the weights.
    """

    parameters: int
    decoder_linear_parameters: int
    bytes: int
    decoder_linear_bytes: int
    flops_per_token: int
    disk_bytes: int | None
    dtype: str


def measure_cost(view: DecoderView, disk_bytes: int | None = None) -> ModelCost:
    """Return the cost of a model; one token runs through it.

    Args:
        view: The model.
        disk_bytes: Size of its weight files, if known.

    Returns:
        The cost.
    """
    size, model = measure_size(view), view.model
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    counter = FlopCounterMode(display=False)
    with frozen(model), torch.no_grad(), counter:
        model(input_ids=token, use_cache=False)
    return ModelCost(
        parameters=size.parameters,
        decoder_linear_parameters=size.decoder_linear_parameters,
        bytes=size.bytes,
        decoder_linear_bytes=size.decoder_linear_bytes,
        flops_per_token=counter.get_total_flops(),
        disk_bytes=disk_bytes,
        dtype=str(model.dtype).removeprefix("torch."),
    )
