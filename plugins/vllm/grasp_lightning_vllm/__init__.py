"""vLLM plugin: serves models that grasp_lightning compressed, in vLLM's own model classes."""


def register() -> None:
    """Register the format of compressed models; vLLM calls this in each of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from grasp_lightning_vllm.config import GraspConfig
    from grasp_lightning_vllm.saved import QUANT_METHOD

    register_quantization_config(QUANT_METHOD)(GraspConfig)
