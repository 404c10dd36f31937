"""The device that a model is put on."""

import os

import torch

from grasp_lightning.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device that a name means, after a check that this machine has it.

    Args:
        name: ``auto`` (CUDA device of this process, else cpu), ``cpu``, ``cuda``, ``cuda:1``, ...

    Returns:
        The device.

    Raises:
        ConfigError: If the name is no device, or this machine has no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # One of several processes on this machine takes a device of its own.
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"model.device: unknown device {name!r}; expected auto, cpu, cuda or cuda:<index>"
        ) from error
    if device.type == "cpu" and not device.index:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or accelerator.type != device.type or (device.index or 0) >= count:
        available = f"cpu and {count} {accelerator.type} device(s)" if accelerator else "cpu only"
        raise ConfigError(
            f"model.device: {name} is not available, this machine has {available}; "
            f"set model.device to auto"
        )
    return device
