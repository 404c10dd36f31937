"""vLLM's side of ``quantization_config``: which layers hold compressed linears."""

import re
from collections.abc import Mapping
from typing import Any, Final, Self

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from grasp_lightning_vllm.completeness import check_all_weights
from grasp_lightning_vllm.linear import GraspLinearMethod
from grasp_lightning_vllm.parts import Linear, allowed_sizes
from grasp_lightning_vllm.saved import QUANT_METHOD, SavedLinears, read_config

# For model classes that do not say what their layers hold.
_FUSED: Final = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


_MERGED: Final = (QKVParallelLinear, MergedColumnParallelLinear)


class GraspConfig(QuantizationConfig):
    """The compressed linears of a model, by the names of vLLM's modules."""

    def __init__(self, saved: SavedLinears) -> None:
        super().__init__()
        self.saved = saved
        self._is_checked = False

    def get_name(self) -> str:
        """Return the name of the format."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model can be served in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: every device multiplies matrices."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: all is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``quantization_config`` of a folder's ``config.json``."""
        return cls(read_config(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Take over the names that a model class gives to modules of the checkpoint."""
        self.saved = SavedLinears(
            hf_to_vllm_mapper.apply_dict(dict(self.saved.ranks)),
            hf_to_vllm_mapper.apply_dict(dict(self.saved.shapes)),
        )

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Rename the bias of a low-rank linear to that of vLLM's layer."""
        return WeightsMapper(orig_to_new_regex={re.compile(r"\.left\.bias$"): ".bias"})

    def get_quant_method(
        self, layer: nn.Module, prefix: str
    ) -> GraspLinearMethod | UnquantizedLinearMethod | None:
        """Return what applies a layer; None for other layers than linears."""
        if not self._is_checked:
            check_all_weights()
            check_engine()
            self._is_checked = True
        if not isinstance(layer, LinearBase):
            return None
        linears = self._linears(prefix)
        is_compressed = any(linear.module in self.saved for linear in linears)
        # vLLM does not notice if one of several dense linears is missing in the checkpoint.
        if is_compressed or (type(layer) in _MERGED and prefix.rpartition(".")[2] in _FUSED):
            return GraspLinearMethod(linears)
        return UnquantizedLinearMethod()

    def _linears(self, prefix: str) -> list[Linear]:
        """Return the linears of the checkpoint that one layer holds."""
        parent, dot, last = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(last) or _FUSED.get(last) or [last]
        modules = [f"{parent}{dot}{name}" for name in names]
        return [
            Linear(module, self.saved.ranks.get(module), self.saved.shapes.get(module))
            for module in modules
        ]


def check_engine() -> None:
    """Raise a ``ValueError`` if the engine was asked for what a compressed model cannot do."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return
    if config.lora_config is not None:
        raise ValueError(
            "vLLM's LoRA layers cannot sit on low-rank linears: merge the adapter into the "
            "compressed model, and serve the merged folder without --enable-lora"
        )
    text = config.model_config.hf_text_config
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "intermediate_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    asked = config.parallel_config.tensor_parallel_size
    allowed = allowed_sizes(heads, kv_heads, width)
    if asked not in allowed:
        raise ValueError(
            f"tensor_parallel_size {asked} does not fit {heads} attention heads, {kv_heads} "
            f"key/value heads and MLPs of {width} channels; choose one of {allowed}"
        )
