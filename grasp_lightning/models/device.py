"""The device of a model."""

import os

import torch

from grasp_lightning.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device for ``cpu``, ``cuda``, ``cuda:1``, ..., or ``auto`` (CUDA, else cpu)."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Each process on this machine takes its own device.
        _check_devices(torch.cuda.device_count())
        # The remainder, because srun may show each process only its own device.
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
    if device.type == "cpu":
        raise ConfigError(f"model.device: {name} is not available: there is one cpu; set it to cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    if accelerator is None or accelerator.type != device.type or (device.index or 0) >= count:
        available = f"cpu and {count} {accelerator.type} device(s)" if accelerator else "cpu only"
        raise ConfigError(
            f"model.device: {name} is not available: this machine has {available}; set "
            "model.device to auto"
        )
    _check_devices(count)
    return device


def _check_devices(count: int) -> None:
    """Refuse more processes on this machine than it has GPUs."""
    number = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if number > count:
        raise ConfigError(
            f"trainer.devices asks for {number} processes on this machine, which has {count} "
            "GPU(s): lower it, or set model.device=cpu"
        )
