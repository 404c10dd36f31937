"""Checks that a model's weights are finite, and fingerprints of them."""

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from grasp_lightning.errors import NumericsError

_NOT_COMPUTED: Final = ("_name_or_path", "transformers_version", "architectures")


def check_finite(model: nn.Module) -> None:
    """Raise a ``NumericsError`` that names the first parameter with NaN or infinity."""
    for name, parameter in model.named_parameters():
        check_finite_weight(name, parameter)


def check_finite_weight(name: str, parameter: Tensor) -> None:
    """Raise a ``NumericsError`` if a weight, which the message names, has NaN or infinity."""
    finite = torch.cat([torch.isfinite(part).flatten() for part in plain_parts(parameter)])
    if not finite.all():
        bad, dtype = finite.numel() - int(finite.sum()), parameter.dtype
        narrow = f", or {dtype} is too narrow for it; try model.dtype=float32"
        raise NumericsError(
            f"weight {name} contains NaN or infinity ({bad} of {finite.numel()} values): the "
            f"checkpoint is damaged{'; download it again' if _is_wide(dtype) else narrow}"
        )


def nan_advice(dtype: torch.dtype, first: str = "check the checkpoint") -> str:
    """Return advice for a model that computes NaN or infinity, such as a wider dtype."""
    return first if _is_wide(dtype) else f"{first}, or try model.dtype float32"


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.itemsize >= torch.float32.itemsize


def model_hash(model: nn.Module) -> str:
    """Return the sha256 of a model's state dict in hex; it does not depend on the device.

    It covers name, dtype, shape and bytes of each tensor, sorted by name.
    """
    return hash_of_tensors(sorted(model.state_dict().items()))


def hash_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the ``model_hash`` of a state dict from its entries, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in plain_parts(tensor):
            digest.update(bytes_of(part))
    return digest.hexdigest()


def config_values(model: PreTrainedModel) -> dict[str, Any]:  # Any: values of JSON
    """Return the keys of a model's config that may change what it computes."""
    values = model.config.to_dict()
    return {key: value for key, value in values.items() if key not in _NOT_COMPUTED}


def tensor_hashes(model: nn.Module) -> dict[str, str]:
    """Return dtype, shape and sha256 of every tensor of a model's state dict, by name."""
    return {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}


def tensor_hash(tensor: Tensor) -> str:
    """Return dtype, shape and sha256 of a tensor, whatever its device."""
    digest = hashlib.sha256()
    for part in plain_parts(tensor):
        digest.update(bytes_of(part))
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}"


def plain_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that hold the values of one: itself, or those in a quantized one."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        return (tensor,)
    names, _ = tensor.__tensor_flatten__()
    return tuple(part for name in names for part in plain_parts(getattr(tensor, name)))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a plain tensor, whatever its device, in row-major order."""
    # numpy has no bfloat16, so torch gives the bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
