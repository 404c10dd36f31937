"""Peak memory of this process while it runs a model, without the peak of loading."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

Covers = Literal["cuda", "resident", "resident_with_loading"]


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """The most memory that a process held while it ran a model, the model included.

    Attributes:
        covers: ``cuda``: memory that torch allocated on the device; ``resident``: resident memory
            of the process, interpreter and libraries included; ``resident_with_loading``: the same
            including the peak of loading, where the system cannot reset it.
    """

    bytes: int
    covers: Covers


def forget_peak(device: torch.device) -> bool:
    """Reset the peak; return False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if not _CLEAR_PEAK.exists():
        return False
    try:
        _CLEAR_PEAK.write_text("5", encoding="ascii")
    except OSError:  # some containers forbid it
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Return the peak since ``forget_peak``: torch's CUDA allocations, or else resident bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not _STATUS.exists():
        return lifetime_peak_bytes()
    # On Linux, ru_maxrss starts at the size of the parent process.
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def lifetime_peak_bytes() -> int:
    """Return the highest resident bytes of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB
