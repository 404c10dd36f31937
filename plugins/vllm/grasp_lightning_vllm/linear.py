"""Low-rank and narrowed linears inside vLLM's own layers."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from grasp_lightning_vllm.loading import PartLoader, left_factors, num_left
from grasp_lightning_vllm.parts import Layer, Linear, Part, parts_of


class GraspLinearMethod(LinearMethodBase):
    """Holds the parts of one layer.

    Products are left to vLLM's own method, which packs weights for the device.

    Args:
        linears: The linears of the checkpoint that the layer holds.
    """

    def __init__(self, linears: list[Linear]) -> None:
        self._linears = linears
        self._dense = UnquantizedLinearMethod()
        self.parts: tuple[Part, ...] = ()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: object,
    ) -> None:
        """Give a layer the parameters of its parts, and the loaders that fill them."""
        del input_size_per_partition, output_partition_sizes, options
        self.parts = parts = parts_of(dense_layer(layer, input_size, output_size), self._linears)
        self._loader = PartLoader(parts, has_bias=layer.has_bias)
        columns = parts[0].columns.size
        stack = torch.empty(sum(part.height for part in parts), columns, dtype=params_dtype)
        _set_parameter(layer, "weight", stack, self._loader.weight)
        if any(part.rank is not None for part in parts):
            layer.left = nn.Module()
            flat = torch.empty(sum(num_left(part) for part in parts), dtype=params_dtype)
            _set_parameter(layer.left, "weight", flat, self._loader.left)
        # The layer makes its bias after this, of this size and with this loader.
        layer.weight_loader = self._loader.bias
        if isinstance(layer, ColumnParallelLinear):
            layer.output_partition_sizes = [part.num_outputs for part in parts]
            layer.output_size_per_partition = sum(layer.output_partition_sizes)
        elif isinstance(layer, RowParallelLinear):
            layer.input_size_per_partition = columns

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that every tensor came, and let vLLM pack each matrix for the device."""
        self._loader.check_complete()
        lefts = [None] * len(self.parts)
        if hasattr(layer, "left"):
            lefts = left_factors(self.parts, layer.left.weight.data)
        layer.left = nn.ModuleList([nn.Identity() if left is None else _Factor(left) for left in lefts])
        for holder in (layer, *layer.left):
            if getattr(holder, "weight", None) is not None and holder.weight.numel():
                self._dense.process_weights_after_loading(holder)
        self._heights = [part.height for part in self.parts]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer, (..., inputs) -> (..., outputs)."""
        if all(part.rank is None for part in self.parts):
            return self._dense.apply(layer, x, bias)
        outputs = [
            value if part.rank is None else self._through_left(left, value, part)
            for part, left, value in zip(self.parts, layer.left, self._stacked(layer, x), strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # In place: packing for the CPU may have made the bias float32, which must not spread.
        return y if bias is None else y.add_(bias)

    def _stacked(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        if not any(self._heights):
            return tuple(x.new_empty(*x.shape[:-1], 0) for _ in self.parts)
        stacked: Tensor = self._dense.apply(layer, x, None)
        return (stacked,) if len(self.parts) == 1 else stacked.split(self._heights, dim=-1)

    def _through_left(self, left: nn.Module, value: Tensor, part: Part) -> Tensor:
        if not part.rank:
            return value.new_zeros(*value.shape[:-1], part.num_outputs)
        y: Tensor = self._dense.apply(left, value.contiguous(), None)
        return y


class _Factor(nn.Module):
    """A left factor, where vLLM's method expects it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def dense_layer(layer: Any, input_size: int, output_size: int) -> Layer:  # Any: vLLM has no types
    """Describe a layer of vLLM as it would be without compression."""
    if isinstance(layer, QKVParallelLinear):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        outputs = (
            heads * layer.head_size,
            kv_heads * layer.head_size,
            kv_heads * layer.v_head_size,
        )
        same = layer.num_kv_head_replicas
        return Layer(
            outputs=outputs,
            inputs=input_size,
            split="outputs",
            process=layer.tp_rank,
            num_processes=layer.tp_size,
            copies=(1, same, same),
        )
    outputs = tuple(getattr(layer, "output_sizes", (output_size,)))
    if isinstance(layer, RowParallelLinear | ColumnParallelLinear):
        return Layer(
            outputs=outputs,
            inputs=input_size,
            split="inputs" if isinstance(layer, RowParallelLinear) else "outputs",
            process=layer.tp_rank,
            num_processes=layer.tp_size,
        )
    return Layer(outputs=outputs, inputs=input_size)


def _set_parameter(module: nn.Module, name: str, data: Tensor, loader: Any) -> None:  # Any: a method
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]  # where vLLM looks for it
    module.register_parameter(name, parameter)
