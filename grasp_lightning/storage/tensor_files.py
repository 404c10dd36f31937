"""Tensor files that a run keeps for a later start, with metadata that identifies them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.models.integrity import bytes_of
from grasp_lightning.models.streamed_saving import DTYPE_NAMES
from grasp_lightning.reading.tensors import open_tensors, read_tensors
from grasp_lightning.reading.text import told

MEASURE_AGAIN: Final = "delete it to measure that part again"

_LAYOUT = "layout"
_ENTRY_BYTES = 192  # at most, of an entry of the header without its name


class TensorFile:
    """One file, checked on every read: a damaged one raises a ``PlanError`` that names it.

    It is damaged if it cannot be read, lacks metadata, holds tensors of other names, shapes or
    dtypes than were saved, or non-finite numbers.

    Args:
        path: Its place; it may be absent.
        *keys: Required keys of its metadata.
        advice: What the user can do about a damaged file.

    Attributes:
        shapes: Shapes of all tensors, after a call of ``metadata``.
    """

    def __init__(self, path: Path, *keys: str, advice: str = MEASURE_AGAIN) -> None:
        self.path = path
        self._keys = keys
        self._advice = advice
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __bool__(self) -> bool:
        """Return whether anything exists at the path."""
        return self.path.exists() or self.path.is_symlink()

    def metadata(self) -> dict[str, str]:
        """Return the metadata without reading a tensor; a damaged file raises ``PlanError``."""
        with open_tensors(self.path, PlanError, advice=self._advice) as content:
            metadata: dict[str, str] = content.metadata() or {}
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118  no dict
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        missing = [key for key in self._keys if key not in metadata]
        if missing:
            raise PlanError(self.damaged(f"its metadata lacks {missing[0]}"))
        if metadata.get(_LAYOUT, _layout(kinds)) != _layout(kinds):
            raise PlanError(self.damaged("its tensors are not the ones that were saved"))
        return metadata

    def read(self, names: Iterable[str] | None = None, ignoring: str = "\0") -> dict[str, Tensor]:
        """Return tensors on the CPU, by name.

        Args:
            names: Names of the tensors; None reads all.
            ignoring: Suffix of the names of tensors that may be non-finite.

        Raises:
            PlanError: If the file is damaged.
        """
        if names is None:
            tensors = read_tensors(self.path, PlanError, advice=self._advice)
        else:
            with open_tensors(self.path, PlanError, advice=self._advice) as content:
                tensors = {name: content.get_tensor(name) for name in names}
        for name, value in tensors.items():
            if not name.endswith(ignoring) and not torch.isfinite(value).all():
                raise PlanError(self.damaged(f"{name} has values that are not finite"))
        return tensors

    def damaged(self, reason: object) -> str:
        """Return the message that the file is damaged, and why."""
        return told(self.path, f"is damaged: {reason}", self._advice)

    def check(
        self, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shape: int
    ) -> Tensor:
        """Return a tensor after a check of its dtype and shape, where -1 is any size.

        Raises:
            PlanError: If it is missing or wrong.
        """
        found = tensors.get(name)
        if found is None:
            raise PlanError(self.damaged(f"it has no {name}"))
        is_of_shape = len(shape) == found.ndim and all(
            size in (-1, own) for size, own in zip(shape, found.shape, strict=True)
        )
        if found.dtype != dtype or not is_of_shape:
            raise PlanError(
                self.damaged(
                    f"{name} must be {dtype} of shape {shape}, got {found.dtype} of shape "
                    f"{tuple(found.shape)}"
                )
            )
        return found


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    may_grow: bool = False,
) -> None:
    """Write a file for ``TensorFile``; equal tensors and metadata give equal bytes.

    Args:
        tensors: Tensors by name; two names may share one.
        may_grow: Whether a later file may hold more rows: then the shapes are not recorded.
    """
    stored = {name: value.cpu().contiguous() for name, value in tensors.items()}
    places = [value.untyped_storage().data_ptr() for value in stored.values() if value.numel()]
    if len(set(places)) < len(places):
        stored = {name: value.clone() for name, value in stored.items()}
    said = dict(metadata or {})
    save_file(stored, path, metadata=said if may_grow else {**said, _LAYOUT: _layout({})})
    if not may_grow:
        _complete_header(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file like ``save_tensors``, with one tensor in memory at a time.

    The header comes first in the file, but shapes are known only once all tensors were read: so
    space is kept for it.

    Args:
        tensors: Tensors by name, possibly read on access.
    """
    names, said = sorted(tensors), dict(metadata or {})
    room = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
    room += len(json.dumps(said)) + _ENTRY_BYTES
    room += -room % 8
    header: dict[str, Any] = {}  # Any: JSON
    with path.open("wb") as file:
        file.seek(8 + room)
        end = 0
        for name in names:
            value = tensors[name].detach().cpu().contiguous()
            start, end = end, end + value.nbytes
            kind = DTYPE_NAMES[value.dtype]
            header[name] = {
                "dtype": kind,
                "shape": list(value.shape),
                "data_offsets": [start, end],
            }
            file.write(bytes_of(value))
        said[_LAYOUT] = _layout({k: (v["dtype"], v["shape"]) for k, v in header.items()})
        header = {"__metadata__": dict(sorted(said.items())), **header}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= room
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))


def _complete_header(path: Path) -> None:
    """Insert the layout and sort the metadata: the library's order varies between calls."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))  # Any: JSON
        said = header.pop("__metadata__")
        said[_LAYOUT] = _layout({k: (v["dtype"], v["shape"]) for k, v in header.items()})
        header = {"__metadata__": dict(sorted(said.items())), **header}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # it holds the same
        file.seek(8)
        file.write(text.ljust(size))


def _layout(kinds: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """Return the fingerprint of names, dtypes and shapes."""
    plain = {name: [dtype, list(shape)] for name, (dtype, shape) in kinds.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
