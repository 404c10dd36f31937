"""What a measurement ran on."""

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from grasp_lightning import __version__


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and versions behind a measurement.

    Attributes:
        device: Kind of device, such as ``cpu`` or ``cuda``.
        device_name: Model of the processor or accelerator.
        cores: Logical cores of the processor.
        threads: Threads that torch used on the CPU.
        system: Operating system.
        versions: Of Python and of the packages that run models.
    """

    device: str
    device_name: str
    cores: int
    threads: int
    system: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return the facts as plain values."""
        return asdict(self)


def describe_machine(device: torch.device) -> Machine:
    """Return what runs models on a device, with the number of threads that is set now.

    Args:
        device: Where the models are.

    Returns:
        The facts.
    """
    is_cuda = device.type == "cuda"
    packages = {package: version(package) for package in ("torch", "transformers")}
    return Machine(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=platform.system(),
        versions={
            "grasp_lightning": __version__,
            "python": platform.python_version(),
            **packages,
            **({"cuda": str(torch.version.cuda)} if is_cuda else {}),
        },
    )


def processor_name() -> str:
    """Return the model of this machine's processor, or its architecture where that is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()
