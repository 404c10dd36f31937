"""Models that no process holds whole: every weight is split over all of them, by FSDP2.

Each linear is a group of its own, and no group holds another one: a linear that is replaced, or
whose layer is dropped, leaves nothing behind in a parent, and passes may skip layers.
"""

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.errors import ModelError
from grasp_lightning.models.linears import DenseModule, is_expert_part

logger = logging.getLogger(__name__)


def process_mesh(device: torch.device) -> DeviceMesh:
    """Return all processes of the run in one row; all of them must ask at once."""
    return init_device_mesh(device.type, (processes.num_processes(),))


def shard(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Keep this process's part of every large weight, on its device, and free the rest.

    The other processes need not be there. The device holds one whole linear at a time. What is
    small stays whole everywhere: norms, and buffers; so do tied weights, which two groups
    would have to share.

    Args:
        model: A whole model, in most cases on the CPU; changed in place.
        mesh: What ``process_mesh`` gave.
        device: Device that this process computes on.
    """
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    tied: list[str] = []
    for name, module in _groups(model, ""):
        if any(uses[id(parameter)] > 1 for parameter in module.parameters()):
            tied.append(name)
        else:
            _shard_group(module, mesh)
    if tied and processes.is_first():
        logger.warning("tied weights are whole in every process: %s", ", ".join(tied))
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it with a too narrow type


def shard_like(new: nn.Module, old: nn.Module) -> None:
    """Split a linear, or those of a module, as another linear is split that it stands in for."""
    mesh = mesh_of(old)
    if mesh is not None:
        groups = [("", new)] if isinstance(new, DenseModule) else _groups(new, "")
        for _, module in groups:
            _shard_group(module, mesh)


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the processes that share the weights of a module, None if it is whole."""
    shared = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return next(shared, None)


def is_sharded(model: nn.Module) -> bool:
    """Return whether weights of a module are split over several processes."""
    return mesh_of(model) is not None


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts; all processes must ask at once, in one order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_runs(model: PreTrainedModel) -> None:
    """Run two tokens through a sharded model; all processes must do so at once.

    Args:
        model: The model.

    Raises:
        ModelError: If the model reads a weight without calling the module that holds it, and so
            meets a part of it.
        RuntimeError: Any other one of the model.
    """
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise ModelError(
            f"{type(model).__name__} reads weights without calling the modules that hold them, "
            f"which trainer.strategy fsdp does not support: use auto"
        ) from error


def _groups(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose weights are brought together at a time, with their names.

    A mixture of experts is one group: which of its linears run depends on the tokens, and all
    processes must bring together the same ones.
    """
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, DenseModule | nn.Embedding) or is_expert_part(child_name, child):
            yield path, child
        else:
            yield from _groups(child, path)


def _shard_group(module: nn.Module, mesh: DeviceMesh) -> None:
    # True: a group without a parent would else stay whole after its first use.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
