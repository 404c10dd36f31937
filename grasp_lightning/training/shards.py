"""Parameters and optimizer states that are split over processes, read and written as a whole.

FSDP2 holds a parameter as a ``DTensor``. DeepSpeed holds a float32 copy of it and the states of the
optimizer in parts, and with ZeRO-3 the parameter itself, too. Every function here is to be called
in all processes together, in the same order.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from grasp_lightning.models import sharding

_ZERO_3, _ZERO = "ds_id", "_hp_mapping"  # attributes that DeepSpeed gives to parameters


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter as a whole; nothing is exchanged.

    Args:
        parameter: A parameter of any strategy.

    Returns:
        The shape.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_values(tensor: Tensor) -> Tensor:
    """Return a parameter, or a state of it in FSDP2, as a whole.

    Args:
        tensor: A tensor of any strategy.

    Returns:
        Detached values: of DeepSpeed the float32 copy that the optimizer changes.
    """
    if _is_zero(tensor):
        copy: Tensor = _deepspeed().utils.safe_get_full_fp32_param(tensor)
        return copy.detach()
    return sharding.whole(tensor).detach()


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other values.

    Args:
        parameter: A parameter of any strategy.
        value: All of its values, the same in every process.
    """
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


def whole_state(
    optimizer: Any,  # noqa: ANN401  of torch, or a wrapper of DeepSpeed's
    parameter: nn.Parameter,
) -> dict[str, Tensor]:
    """Return what AdamW holds for a parameter, as a whole.

    Args:
        optimizer: AdamW, or DeepSpeed's wrapper of it.
        parameter: One of its parameters.

    Returns:
        ``step``, ``exp_avg`` and ``exp_avg_sq``; empty before the first step.
    """
    if not _is_zero(parameter):
        return {
            key: whole_values(value) for key, value in optimizer.state.get(parameter, {}).items()
        }
    own: dict[str, Tensor] = next(iter(optimizer.optimizer.state.values()), {})
    read = _deepspeed().utils.safe_get_full_optimizer_state
    return {
        key: value.detach() if value.ndim == 0 else read(parameter, key)
        for key, value in own.items()
    }


@torch.no_grad()
def fill_state(
    optimizer: Any,  # noqa: ANN401  of torch, or a wrapper of DeepSpeed's
    parameter: nn.Parameter,
    state: dict[str, Tensor],
) -> None:
    """Give AdamW other values for a parameter.

    Args:
        optimizer: AdamW, or DeepSpeed's wrapper of it, after ``prepare_states``.
        parameter: One of its parameters.
        state: What ``whole_state`` returned.
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


def prepare_states(optimizer: Any) -> None:  # noqa: ANN401  of torch, or DeepSpeed's wrapper
    """Make room for the states of an optimizer that has not stepped yet; of DeepSpeed alone.

    Args:
        optimizer: AdamW, or DeepSpeed's wrapper of it.
    """
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
    """Split the weights of a module as ZeRO-3 does, each on its own, so that it need not fit.

    Args:
        module: A module on the CPU, changed in place.
        config: DeepSpeed's configuration.
        device: Device of this process, where all but the weights goes.
    """
    if isinstance(config, dict) and config.get("bf16", {}).get("enabled"):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    _deepspeed().zero.Init(module=module, config_dict_or_path=config)
    for child in module.children():
        if not any(True for _ in child.parameters()):
            child.to(device)  # metrics, whose sums are no buffers
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _part(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value.to(like.device).clone()
    moved = value.to(device=like.device)
    # Every process has all values, so none are sent.
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def _is_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, _ZERO_3) or hasattr(tensor, _ZERO)


def _deepspeed() -> Any:  # noqa: ANN401  an optional dependency without types
    # Parameters with its attributes exist only where Lightning's strategy has imported it.
    return import_module("deepspeed")
