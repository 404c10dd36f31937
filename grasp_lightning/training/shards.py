"""Reads and writes sharded parameters and optimizer states as whole tensors.

FSDP2 stores a parameter as a ``DTensor``. DeepSpeed shards optimizer states and a float32 copy of
the parameter; ZeRO-3 shards the parameter, too. Except for ``whole_shape``, all processes must call
these functions together, in the same order.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from grasp_lightning.models import sharding

_AdamW = Any  # torch's, or DeepSpeed's untyped wrapper
_ZERO_3, _ZERO = "ds_id", "_hp_mapping"  # attributes that DeepSpeed gives to parameters


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the full shape of a parameter, without communication."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_values(tensor: Tensor) -> Tensor:
    """Return a parameter, or its FSDP2 optimizer state, as a whole tensor, detached.

    DeepSpeed's parameters give the float32 copy that the optimizer updates.
    """
    if _is_zero(tensor):
        copy: Tensor = _deepspeed().utils.safe_get_full_fp32_param(tensor)
        return copy.detach()
    return sharding.whole(tensor).detach()


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter with whole values, the same in every process."""
    if isinstance(parameter, DTensor):
        parameter.copy_(_part(value, parameter))
        return
    if not _is_zero(parameter):
        parameter.copy_(value)
        return
    moved = value.to(device=parameter.device, dtype=torch.float32)
    _deepspeed().utils.safe_set_full_fp32_param(parameter, moved)
    # The copy in the precision of the forward pass follows at the next step only.
    if hasattr(parameter, _ZERO_3):
        with _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(moved)
    else:
        parameter.data.copy_(moved)


def whole_state(optimizer: _AdamW, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return AdamW's ``step``, ``exp_avg`` and ``exp_avg_sq`` of a parameter as whole tensors.

    The result is empty before the first step.
    """
    if not _is_zero(parameter):
        state = optimizer.state.get(parameter, {})
        return {key: whole_values(value) for key, value in state.items()}
    own: dict[str, Tensor] = next(iter(optimizer.optimizer.state.values()), {})
    read = _deepspeed().utils.safe_get_full_optimizer_state
    return {
        key: value.detach() if value.ndim == 0 else read(parameter, key)
        for key, value in own.items()
    }


@torch.no_grad()
def fill_state(optimizer: _AdamW, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Overwrite AdamW's state of a parameter with a result of ``whole_state``.

    DeepSpeed's wrapper needs ``prepare_states`` first.
    """
    if not _is_zero(parameter):
        optimizer.state[parameter] = {
            key: value.clone() if value.ndim == 0 else _part(value, parameter)
            for key, value in state.items()
        }
        return
    write = _deepspeed().utils.safe_set_full_optimizer_state
    for key, value in state.items():
        if value.ndim == 0:  # the number of steps, one for all parameters of a process
            for own in optimizer.optimizer.state.values():
                own[key] = value.clone()
        else:
            write(parameter, value.to(torch.float32), key)


def prepare_states(optimizer: _AdamW) -> None:
    """Allocate the states of a DeepSpeed optimizer that has not stepped yet; a no-op for others."""
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if parts is None:
        parts = getattr(optimizer, "single_partition_of_fp32_groups", [])  # ZeRO-1 and 2
    for part in parts:
        optimizer.optimizer.state[part] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(part),
            "exp_avg_sq": torch.zeros_like(part),
        }
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Normally done in the first step; before it parameters do not know their states.
        optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def split_weights(module: nn.Module, config: object, device: torch.device) -> None:
    """Shard the weights of a module on the CPU as ZeRO-3 does, one at a time to save memory.

    Args:
        module: Changed in place.
        config: DeepSpeed's configuration.
        device: Device of this process, for everything but the weights.
    """
    if isinstance(config, dict) and config.get("bf16", {}).get("enabled"):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    _deepspeed().zero.Init(module=module, config_dict_or_path=config)
    for child in module.children():
        if not any(True for _ in child.parameters()):
            child.to(device)  # metrics, whose sums are not buffers
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _part(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value.to(like.device).clone()
    # Every process has all values, so none are sent.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _is_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, _ZERO_3) or hasattr(tensor, _ZERO)


def _deepspeed() -> Any:  # noqa: ANN401  an optional dependency without types
    # Parameters with its attributes exist only where Lightning's strategy has imported it.
    return import_module("deepspeed")
