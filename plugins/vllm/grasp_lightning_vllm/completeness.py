"""Missing tensors are errors."""

from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from grasp_lightning_vllm.saved import QUANT_METHOD


def check_all_weights() -> None:
    """Let vLLM check that the checkpoint has every parameter, as it does for dense models.

    vLLM skips its check for every folder with a ``quantization_config``, and has no hook for a
    format to ask for it. The methods of linears check linears alone, not norms or embeddings.
    """
    load: Any = DefaultModelLoader.load_weights  # Any: functions have no attributes of ours
    if hasattr(load, "checks_all_weights"):
        return

    def load_weights(self: DefaultModelLoader, model: nn.Module, model_config: ModelConfig) -> None:
        if model_config.quantization == QUANT_METHOD and self.enable_weights_track is None:
            self.enable_weights_track = True
        load(self, model, model_config)

    holder: Any = load_weights  # Any: as above
    holder.checks_all_weights = True
    DefaultModelLoader.load_weights = holder
