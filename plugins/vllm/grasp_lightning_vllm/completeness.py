"""Missing tensors are errors."""

from functools import wraps

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from grasp_lightning_vllm.saved import QUANT_METHOD


def check_all_weights() -> None:
    """Let vLLM check that the checkpoint has every tensor, as it does for dense models.

    vLLM skips its check for every folder with a ``quantization_config``, and has no hook for a
    format to ask for it. The method of compressed linears checks those linears alone, not norms or
    embeddings.
    """
    load = DefaultModelLoader.load_weights
    if getattr(load, "checks_grasp", False):
        return

    @wraps(load)
    def load_weights(self: DefaultModelLoader, model: nn.Module, model_config: ModelConfig) -> None:
        if model_config.quantization == QUANT_METHOD and self.enable_weights_track is None:
            self.enable_weights_track = True
        load(self, model, model_config)

    load_weights.checks_grasp = True
    DefaultModelLoader.load_weights = load_weights
