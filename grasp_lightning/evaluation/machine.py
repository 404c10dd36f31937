"""Hardware and software of a measurement."""

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
        device: Device type, such as ``cpu`` or ``cuda``.
        device_name: Model of the processor or accelerator.
        cores: Logical cores of the processor.
        threads: CPU threads of torch.
        versions: Of Python and of the packages that run models.
    """

    device: str
    device_name: str
    cores: int
    threads: int
    system: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return plain values."""
        return asdict(self)


def describe_machine(device: torch.device) -> Machine:
    """Return the machine of a device, with torch's current number of threads."""
    is_cuda = device.type == "cuda"
    return Machine(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=platform.system(),
        versions={
            "grasp_lightning": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            **({"cuda": str(torch.version.cuda)} if is_cuda else {}),
        },
    )


def processor_name() -> str:
    """Return the processor's model, or its architecture where the model is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()
