"""Peak memory of this process while it runs a model, without what loading took."""

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
    """The most memory that a process held while it ran a model.

    Attributes:
        bytes: The highest number of bytes, the model among them.
        covers: What was counted: memory that torch allocated on the CUDA device; resident memory
            of the process, interpreter and libraries included; or the same with the peak of
            loading, where the system cannot forget that one.
    """

    bytes: int
    covers: Covers


def forget_peak(device: torch.device) -> bool:
    """Count the peak from what is held now on.

    Args:
        device: Where the model is.

    Returns:
        False where the system cannot do so.
    """
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
    """Return the most memory that was held since ``forget_peak``.

    Args:
        device: Where the model is.

    Returns:
        Bytes that torch allocated on a CUDA device; for others the resident bytes of this process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not _STATUS.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB
    # Not ru_maxrss: on Linux it starts at the size of the process that started this one.
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
