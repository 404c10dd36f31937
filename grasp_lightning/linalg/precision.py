"""The precision of float32 matrix products.

Tensor cores of GPUs and matrix units of CPUs round the inputs of float32 products to TensorFloat32
or bfloat16 where torch's settings allow it. The layers of a model bear that. A Gram matrix does
not: its small eigenvalues would be lost, and two mirrored entries would differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # torch adds it at run time
)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Round the inputs of float32 matrix products as ``torch.set_float32_matmul_precision``.

    The setting applies to the whole process, with all its threads. Afterwards it is as before.

    Args:
        name: ``highest``, ``high`` or ``medium``.
    """
    before = _common_precision()
    if before == name:
        yield
        return
    parts = [backend.fp32_precision for backend in _BACKENDS]
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before or "highest")
        for backend, part in zip(_BACKENDS, parts, strict=True):
            backend.fp32_precision = part


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Do not round the inputs of float32 matrix products, and disable autocast.

    Sums over tokens and decompositions use it. Hooks may call them from inside a mixed-precision
    step, and with any setting of ``torch.set_float32_matmul_precision``.
    """
    with torch.autocast(device.type, enabled=False), matmul_precision("highest"):
        yield


def _common_precision() -> str | None:
    """Return the precision of all backends; None if they were set one by one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name one
        return None
