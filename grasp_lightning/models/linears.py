"""The linears of a decoder layer, whatever a family builds them from.

Legend: N output and M input features of a linear.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from grasp_lightning.models.lowrank import is_replaced

DenseModule = nn.Linear | Conv1D

_EXPERTS, _ROUTER = "experts", "router"  # their names in every sparse family of transformers
_MATRIX_DIMENSIONS = 2


class TransposedLinear:
    """A ``Conv1D`` of transformers, which stores its weight as ``(M, N)``, used as a linear."""

    def __init__(self, module: Conv1D) -> None:
        self._module = module

    @property
    def weight(self) -> Tensor:
        """Transposed view of the weight, ``(N, M)``."""
        return self._module.weight.mT

    @property
    def bias(self) -> Tensor:
        """Bias, ``(N,)``."""
        return self._module.bias

    @property
    def in_features(self) -> int:
        """M."""
        return int(self._module.nx)

    @property
    def out_features(self) -> int:
        """N."""
        return int(self._module.nf)


DenseLinear = nn.Linear | TransposedLinear


def as_linear(module: DenseModule) -> DenseLinear:
    """Return a dense module with its weight as ``(N, M)``."""
    return TransposedLinear(module) if isinstance(module, Conv1D) else module


def dense_modules(module: nn.Module, name: str) -> Iterator[tuple[str, DenseModule]]:
    """Yield name and module of the dense linears in a module that can be replaced, in module order.

    These exclude factors, narrowed linears, and ``skipped_modules``.
    """
    for child_name, child in module.named_children():
        if is_replaced(child) or is_expert_part(child_name, child):
            continue
        if isinstance(child, DenseModule):
            yield f"{name}.{child_name}", child
        else:
            yield from dense_modules(child, f"{name}.{child_name}")


def in_attention(name: str) -> bool:
    """Return whether a name in a decoder layer, such as ``self_attn.q_proj``, is in its attention.

    Most families have "att" in the name (self_attn, attention, attn); the others call it a mixer.
    """
    return "att" in name.split(".", maxsplit=1)[0].lower()


def skipped_modules(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of modules skipped because they belong to a mixture of experts.

    These are the experts, whether parameters of three dimensions or many small linears, and
    everything with parameters in the same block: router, shared expert and its gate.
    """
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        if not is_expert_part(child_name, child):
            yield from skipped_modules(child, path)
        elif _holds_experts(child):
            parts = child.named_children()
            yield from (f"{path}.{part}" for part, m in parts if any(True for _ in m.parameters()))
        else:
            yield path


def is_expert_part(name: str, module: nn.Module) -> bool:
    """Return whether a module of this name is a mixture of experts, its experts, or its router."""
    return _is_experts(name, module) or name == _ROUTER or _holds_experts(module)


def _holds_experts(module: nn.Module) -> bool:
    return any(_is_experts(name, child) for name, child in module.named_children())


def _is_experts(name: str, module: nn.Module) -> bool:
    if name == _EXPERTS:
        return True
    own = module.parameters(recurse=False)
    # Dimensions of size 1 do not count: RWKV mixes tokens by vectors in three dimensions.
    sizes = ([size for size in p.shape if size > 1] for p in own)
    return not isinstance(module, _ConvNd) and any(len(s) > _MATRIX_DIMENSIONS for s in sizes)
