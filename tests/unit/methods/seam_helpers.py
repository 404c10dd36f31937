"""Models whose layers are exactly linear in what a map reads, and a measure for them."""

import torch
from torch import Tensor, nn

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.models.helpers import in_dtype

IDS = torch.arange(60).reshape(2, 30)


class LinearLayer(nn.Module):
    """Adds a linear map of some states to the hidden states, as a whole decoder layer."""

    def __init__(self, reads: dict[str, Tensor] | None, seed: int) -> None:
        super().__init__()
        self._reads = reads
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(32, 32, generator=generator, dtype=torch.float64) * 0.2
        self.weight = nn.Parameter(weight)

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """Return the states after the layer, ``(B, T, C)``."""
        read = hidden_states if self._reads is None else self._reads["output"]
        return hidden_states + read @ self.weight


def linear_model(*layers: int, source: str | None = None) -> DecoderView:
    """A tiny float64 model in which some layers are linear in the output of a linear, or in h."""
    view = DecoderView(in_dtype(tiny_model("qwen2", mlp_bias=True), torch.float64))
    reads: dict[str, Tensor] | None = None
    if source is not None:
        reads = {}
        view.module(source).register_forward_hook(lambda *call: reads.update(output=call[-1]))
    for index in layers:
        view.set_module(f"{view.layers_name}.{index}", LinearLayer(reads, index))
    return view


def run_method(view: DecoderView, config: MethodConfig) -> Plan:
    """Compress a model on a few windows."""
    method = build_method(resolve_method(config), view)
    data = CalibrationData(
        CalibrationConfig(source="pydoc", num_samples=3, seqlen=64, batch_size=2), byte_tokenizer()
    )
    measure = TrainerMeasure(data, progress=False)
    return compress(view, method, measure, Plan(method=method.name), lambda *_: None)
