"""Stand-ins for the modules of vLLM that the plugin imports, which this environment lacks.

They have the base classes, the constructors' order of calls, and the sizes that vLLM computes; the
tests in ``tests/serving`` run the real ones.
"""

from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any  # the stand-ins are as loose as what they stand for

import torch
from torch import Tensor, nn

ENGINE = SimpleNamespace(config=None)  # what get_current_vllm_config_or_none returns


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.data
        layer.weight = nn.Parameter(torch.empty(0))  # as on the CPU

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.packed, bias)


class LinearBase(nn.Module):
    """A layer of one process; ``sizes`` are summed over all processes."""

    def __init__(
        self,
        inputs: int,
        sizes: Iterable[int],
        *,
        process: int = 0,
        num_processes: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, self.has_bias = process, num_processes, bias
        self.inputs, self.output_sizes = inputs, list(sizes)

    def attach(self, method: Any) -> None:
        """Create weights, and then the bias, as the constructors of vLLM do."""
        outputs = sum(self.output_sizes)
        self.output_size_per_partition = outputs
        self.quant_method = method
        method.create_weights(
            self, self.inputs, self.output_sizes, self.inputs, outputs, torch.float64
        )
        self.bias = None
        if self.has_bias:
            size = self.output_size_per_partition
            bias: Any = nn.Parameter(torch.empty(size, dtype=torch.float64), requires_grad=False)
            bias.weight_loader = self.weight_loader
            self.bias = bias

    def load(self, key: str, tensor: Tensor, shard: object) -> None:
        parameter: Any = self.get_parameter(key)
        parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


class ColumnParallelLinear(LinearBase):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(self, inputs: int, heads: tuple[int, int], size: int, **options: Any) -> None:
        all_heads, kv_heads = heads
        super().__init__(inputs, [all_heads * size, kv_heads * size, kv_heads * size], **options)
        self.total_num_heads, self.total_num_kv_heads = heads
        self.head_size = self.v_head_size = size
        self.num_kv_head_replicas = max(1, self.tp_size // kv_heads)


class RowParallelLinear(LinearBase):
    pass


class WeightsMapper(SimpleNamespace):
    pass


def modules() -> dict[str, ModuleType]:
    """Return the stand-ins by the names under which the plugin imports them."""
    linear = ModuleType("linear")
    for item in (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    ):
        setattr(linear, item.__name__, item)
    config, base, utils, loader = (ModuleType(n) for n in ("config", "base", "utils", "loader"))
    config.get_current_vllm_config_or_none = lambda: ENGINE.config  # type: ignore[attr-defined]
    config.ModelConfig = object  # type: ignore[attr-defined]
    base.QuantizationConfig = QuantizationConfig  # type: ignore[attr-defined]
    utils.WeightsMapper = WeightsMapper  # type: ignore[attr-defined]
    loader.DefaultModelLoader = type("DefaultModelLoader", (), {"load_weights": lambda *_: None})  # type: ignore[attr-defined]
    return {
        "vllm.config": config,
        "vllm.model_executor.layers.linear": linear,
        "vllm.model_executor.layers.quantization.base_config": base,
        "vllm.model_executor.models.utils": utils,
        "vllm.model_executor.model_loader.default_loader": loader,
    }
