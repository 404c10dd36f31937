"""Low-rank and narrowed linears inside vLLM's own layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from grasp_lightning_vllm.loading import PartLoader, left_factors, num_left
from grasp_lightning_vllm.parts import Layer, Linear, Part, Split, parts_of


class GraspLinearMethod(LinearMethodBase):
    """Holds and applies the parts of one layer.

    Products are left to vLLM's own method, which packs weights for the device.

    Args:
        linears: The linears of the checkpoint that the layer holds.
    """

    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears
        self._dense = UnquantizedLinearMethod()
        self._parts: tuple[Part, ...] = ()
        self._heights: list[int] = []

    def create_weights(  # noqa: PLR0917  # the arguments of vLLM
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: object,
    ) -> None:
        """Give a layer the parameters of its parts, and the loaders that fill them."""
        del input_size_per_partition, output_partition_sizes, options
        self._parts = parts = parts_of(dense_layer(layer, input_size, output_size), self.linears)
        self._heights = [part.height for part in parts]
        self._loader = PartLoader(parts, has_bias=layer.has_bias)
        columns = parts[0].columns.size
        stack = torch.empty(sum(self._heights), columns, dtype=params_dtype)
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

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that every tensor came, and let vLLM pack each matrix for the device."""
        self._loader.check_complete()
        if hasattr(layer, "left"):
            factors = left_factors(self._parts, layer.left.weight.data)
            layer.left = nn.ModuleList(_Factor(factor) for factor in factors)
            for holder in layer.left:
                if holder.weight is not None:
                    self._dense.process_weights_after_loading(holder)
        if any(self._heights):
            self._dense.process_weights_after_loading(layer)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer, (..., inputs) -> (..., outputs)."""
        if not hasattr(layer, "left"):
            dense: Tensor = self._dense.apply(layer, x, bias)
            return dense
        values = self._stacked(layer, x)
        outputs = [
            value if part.rank is None else self._through_left(left, value, part)
            for part, left, value in zip(self._parts, layer.left, values, strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # In place: packing for the CPU may have made the bias float32, which must not spread.
        return y if bias is None else y.add_(bias)

    def _stacked(self, layer: LinearBase, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the right factor or the dense matrix of each part makes of the input."""
        if not any(self._heights):
            return tuple(x.new_empty(*x.shape[:-1], 0) for _ in self._parts)
        stacked: Tensor = self._dense.apply(layer, x, None)
        return torch.split(stacked, self._heights, dim=-1)

    def _through_left(self, left: nn.Module, value: Tensor, part: Part) -> Tensor:
        if not part.rank:
            return value.new_zeros(*value.shape[:-1], part.num_outputs)
        y: Tensor = self._dense.apply(left, value.contiguous(), None)
        return y


class _Factor(nn.Module):
    """A left factor, where vLLM's method expects it; None for a part that needs none."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)


def dense_layer(layer: LinearBase, input_size: int, output_size: int) -> Layer:
    """Describe a layer of vLLM as it would be without compression."""
    split: Split = "nothing"
    if isinstance(layer, RowParallelLinear | ColumnParallelLinear):
        split = "inputs" if isinstance(layer, RowParallelLinear) else "outputs"
    outputs, copies = tuple(getattr(layer, "output_sizes", (output_size,))), None
    if isinstance(layer, QKVParallelLinear):
        # output_sizes counts the copies of key/value heads, too.
        q = layer.total_num_heads * layer.head_size
        k, v = (layer.total_num_kv_heads * size for size in (layer.head_size, layer.v_head_size))
        outputs, copies = (q, k, v), (1, *[layer.num_kv_head_replicas] * 2)
    return Layer(
        outputs=outputs,
        inputs=input_size,
        split=split,
        process=layer.tp_rank,
        num_processes=layer.tp_size,
        copies=copies,
    )


def _set_parameter(module: nn.Module, name: str, data: Tensor, loader: Callable[..., None]) -> None:
    parameter: Any = nn.Parameter(data, requires_grad=False)  # Any: vLLM adds attributes
    parameter.weight_loader = loader
    module.register_parameter(name, parameter)
