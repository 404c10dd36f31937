"""Tensor files from the user or an earlier run; every error is one line.

For the arguments, see ``text``.
"""

import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from grasp_lightning.errors import GraspError, PlanError
from grasp_lightning.reading.text import check_file, one_line, told

# What safetensors and torch raise on files that are cut, empty, or of another kind.
_ERRORS = (
    SafetensorError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,  # RecursionError is one
    OverflowError,
    MemoryError,
    ImportError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
)


def read_tensors(
    path: Path, raises: type[GraspError] = PlanError, what: str | None = None, advice: str = ""
) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, on the CPU, by name."""
    with _damage(path, raises, what, advice):
        return load_file(path)


def read_metadata(
    path: Path, raises: type[GraspError] = PlanError, what: str | None = None, advice: str = ""
) -> dict[str, str]:
    """Return the metadata of a safetensors file, without reading a tensor; empty if it has none."""
    with open_tensors(path, raises, what, advice) as content:
        return content.metadata() or {}


@contextmanager
def open_tensors(
    path: Path, raises: type[GraspError] = PlanError, what: str | None = None, advice: str = ""
) -> Iterator[Any]:  # Any: safe_open has no public type
    """Open a safetensors file, to read some of its tensors; errors of reading are one line."""
    with _damage(path, raises, what, advice):
        content = safe_open(path, framework="pt")
    with content:
        try:
            yield content
        except SafetensorError as error:
            raise raises(_line(path, what, error, advice)) from error


def read_checkpoint(
    path: Path, raises: type[GraspError] = PlanError, what: str | None = None, advice: str = ""
) -> Any:  # noqa: ANN401  whatever was saved
    """Return what ``torch.save`` wrote, on the CPU, without executing any of it."""
    with _damage(path, raises, what, advice):
        return _unpickled(path)


def read_shapes(
    path: Path, raises: type[GraspError] = PlanError, what: str | None = None, advice: str = ""
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file or a ``torch.save`` file."""
    if path.suffix == ".safetensors":
        with open_tensors(path, raises, what, advice) as content:
            return {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118  no mapping
    with _damage(path, raises, what, advice):
        found = _unpickled(path, mmap=zipfile.is_zipfile(path))
        return {key: tuple(v.shape) for key, v in found.items() if isinstance(v, Tensor)}


def _unpickled(path: Path, *, mmap: bool = False) -> Any:  # noqa: ANN401  whatever was saved
    with warnings.catch_warnings():
        # Of files that torch then refuses.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


@contextmanager
def _damage(path: Path, raises: type[GraspError], what: str | None, advice: str) -> Iterator[None]:
    """Turn errors of the libraries into one line."""
    check_file(path, raises, what, advice)
    try:
        yield
    except _ERRORS as error:
        raise raises(_line(path, what, error, advice)) from error


def _line(path: Path, what: str | None, error: BaseException, advice: str) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch advises to open such files anyway
        error = pickle.UnpicklingError(
            "not a torch file, or it has objects other than tensors, which may run code"
        )
    return told(what or path, f"is damaged: {one_line(error)}", advice)
