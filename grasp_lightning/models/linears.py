"""The linears inside a decoder layer, whatever a family builds them from, and what is left out.

Legend: N output and M input features of a linear.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from grasp_lightning.models.lowrank import is_replaced

DenseModule = nn.Linear | Conv1D

_EXPERTS, _ROUTER = "experts", "router"  # how transformers calls them in every sparse family
_MATRIX_DIMENSIONS = 2


class DenseLinear(Protocol):
    """What every dense linear offers, a ``torch.nn.Linear`` as it is."""

    @property
    def weight(self) -> Tensor:
        """Weight, ``(N, M)``."""

    @property
    def bias(self) -> Tensor | None:
        """Bias, ``(N,)``, or None."""

    @property
    def in_features(self) -> int:
        """M."""

    @property
    def out_features(self) -> int:
        """N."""


class TransposedLinear:
    """A ``Conv1D`` of transformers, which stores its weight as ``(M, N)``, seen as a linear.

    Args:
        module: The module that is looked at.
    """

    def __init__(self, module: Conv1D) -> None:
        self._module = module

    @property
    def weight(self) -> Tensor:
        """Transposed view of the module's weight, ``(N, M)``."""
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


def as_linear(module: DenseModule) -> DenseLinear:
    """Return a dense module with its weight as ``(N, M)``."""
    return TransposedLinear(module) if isinstance(module, Conv1D) else module


def dense_modules(module: nn.Module, name: str) -> Iterator[tuple[str, DenseModule]]:
    """Yield the dense linears that can be replaced, in module order.

    Factors of low-rank linears, narrowed linears, and what ``skipped_modules`` names are not among
    them.

    Args:
        module: A decoder layer, or a part of it.
        name: Its full name.

    Yields:
        Full name and module.
    """
    for child_name, child in module.named_children():
        if is_replaced(child) or is_expert_part(child_name, child):
            continue
        if isinstance(child, DenseModule):
            yield f"{name}.{child_name}", child
        else:
            yield from dense_modules(child, f"{name}.{child_name}")


def in_attention(name: str) -> bool:
    """Return whether something in a decoder layer is part of its attention block.

    It is if the module below the layer that holds it has "att" in its name (self_attn, attention,
    attn), as in most families of transformers; others call it a mixer.

    Args:
        name: Its name inside the layer, such as ``self_attn.q_proj``.

    Returns:
        True if it is.
    """
    return "att" in name.split(".", maxsplit=1)[0].lower()


def skipped_modules(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of what is left out because it belongs to a mixture of experts.

    These are the experts, be they parameters of three dimensions or many small linears, and all
    that shares a block with them: router, shared expert and its gate.

    Args:
        module: A decoder layer, or a part of it.
        name: Its full name.

    Yields:
        Full name of each part of such a block that has parameters.
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
    """Return whether a module is a mixture of experts, its experts, or its router.

    Args:
        name: Name of the module in its parent.
        module: The module.

    Returns:
        True if it is.
    """
    return _is_experts(name, module) or name == _ROUTER or _holds_experts(module)


def _holds_experts(module: nn.Module) -> bool:
    return any(_is_experts(name, child) for name, child in module.named_children())


def _is_experts(name: str, module: nn.Module) -> bool:
    if name == _EXPERTS:
        return True
    own = module.parameters(recurse=False)
    return not isinstance(module, _ConvNd) and any(p.dim() > _MATRIX_DIMENSIONS for p in own)
