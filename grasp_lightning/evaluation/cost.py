"""What a model costs: parameters, bytes, and operations per token."""

from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.size import measure_size


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Size and work of one model.

    Attributes:
        parameters: Tied parameters count once.
        decoder_linear_parameters: Parameters of the linears in decoder layers.
        bytes: Size of all parameters at the model's dtype.
        flops_per_token: Floating point operations of the matrix products for one token,
            language-model head included; a multiply-add counts as two. Attention to a context is
            not counted: it is the same for all models of one shape.
        disk_bytes: Size of the weight files; None if unknown.
    """

    parameters: int
    decoder_linear_parameters: int
    bytes: int
    decoder_linear_bytes: int
    flops_per_token: int
    disk_bytes: int | None
    dtype: str


def measure_cost(view: DecoderView, disk_bytes: int | None = None) -> ModelCost:
    """Run one token through a model and return its cost."""
    size, model = measure_size(view), view.model
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    counter = FlopCounterMode(display=False)
    with frozen(model), torch.no_grad(), counter:
        model(input_ids=token, use_cache=False)
    return ModelCost(
        **asdict(size),
        flops_per_token=counter.get_total_flops(),
        disk_bytes=disk_bytes,
        dtype=str(model.dtype).removeprefix("torch."),
    )
