"""Whether a model's weights are sound, and which weights they are."""

import hashlib

import torch
from torch import Tensor, nn

from grasp_lightning.errors import NumericsError


def check_finite(model: nn.Module) -> None:
    """Check that no parameter holds NaN or infinity.

    Args:
        model: Any module.

    Raises:
        NumericsError: Naming the first parameter that does.
    """
    for name, parameter in model.named_parameters():
        finite = torch.isfinite(parameter)
        if not finite.all():
            bad = finite.numel() - int(finite.sum())
            raise NumericsError(
                f"weight {name} holds NaN or infinity ({bad} of {finite.numel()} values): the "
                f"checkpoint is damaged{_or_narrow(parameter.dtype)}"
            )


def nan_advice(dtype: torch.dtype, first: str = "check the checkpoint") -> str:
    """Return what to do where a model computes NaN or infinity: a wider type, if there is one."""
    return first if _is_wide(dtype) else f"{first}, or try model.dtype float32"


def _or_narrow(dtype: torch.dtype) -> str:
    if _is_wide(dtype):
        return "; fetch it again"
    return f", or {dtype} is too narrow for it; try model.dtype=float32"


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.itemsize >= torch.float32.itemsize


def model_hash(model: nn.Module) -> str:
    """Return a fingerprint of a model's weights that does not depend on the device.

    Args:
        model: Any module.

    Returns:
        sha256 in hex, over name, dtype, shape and bytes of each tensor of the state dict, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def tensor_hashes(model: nn.Module) -> dict[str, str]:
    """Return type, shape and sha256 of every tensor of a model's state dict, by name."""
    hashes = {
        name: hashlib.sha256(_bytes_of(tensor)).hexdigest()
        for name, tensor in model.state_dict().items()
    }
    types = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in model.state_dict().items()}
    return {name: f"{types[name]} {digest}" for name, digest in hashes.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16, so the bytes are taken before the tensor leaves torch.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
