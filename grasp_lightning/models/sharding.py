"""Models whose weights FSDP2 splits over all processes.

Each linear is its own group, and groups do not nest: replacing a linear or dropping its layer
leaves nothing behind in a parent, and passes may skip layers.
"""

import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.errors import ModelError
from grasp_lightning.models.linears import DenseModule, is_expert_part

logger = logging.getLogger(__name__)


def process_mesh(device: torch.device) -> DeviceMesh:
    """Return all processes of the run in one row; all of them must call this together."""
    return init_device_mesh(device.type, (processes.num_processes(),))


def shard(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Keep this process's shard of every large weight on its device, and free the rest.

    It needs no other process, and the device holds one whole linear at a time. Norms, buffers and
    tied weights (which two groups would have to share) stay whole in every process. The model
    changes in place; usually it is on the CPU.
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
    """Shard a linear, or the linears in a module, like the linear that it replaces."""
    mesh = mesh_of(old)
    if mesh is not None:
        groups = [("", new)] if isinstance(new, DenseModule) else _groups(new, "")
        for _, module in groups:
            _shard_group(module, mesh)


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the processes that share the weights of a module; None if it is not sharded."""
    shared = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return next(shared, None)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a module are split over several processes."""
    return mesh_of(model) is not None


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from its shards; all processes must call this together, in one order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or a whole tensor itself; memory is shared."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def copy_into(parameter: Tensor, values: Tensor) -> None:
    """Replace the values of a parameter, whole or sharded; without gradients.

    All processes that share a sharded one must call this together with equal values.
    """
    given = values.detach().to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        # Every process has all values: none has to send them.
        given = distribute_tensor(
            given, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(given)


def check_runs(model: PreTrainedModel) -> None:
    """Raise a ``ModelError`` if a model cannot run sharded; all processes must call this."""
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise ModelError(
            f"{type(model).__name__} reads weights without calling their modules, which "
            "trainer.strategy fsdp does not support: use auto"
        ) from error


def _groups(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose weights are gathered as one group, with their names.

    A mixture of experts is one group: tokens decide which of its linears run, and all processes
    must gather the same ones.
    """
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, DenseModule | nn.Embedding) or is_expert_part(child_name, child):
            yield path, child
        else:
            yield from _groups(child, path)


def _shard_group(module: nn.Module, mesh: DeviceMesh) -> None:
    # Without True, a group without a parent would stay gathered after its first use.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
