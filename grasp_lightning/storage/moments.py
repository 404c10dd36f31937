"""``statistics.safetensors``: moments of a curvature pass, for this run and later runs.

Gram matrices are packed triangles, stored once for all linears that read the same input. If the
linears did not fit into memory together, each group of layers has a file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import PlanError
from grasp_lightning.linalg.triangles import pack_triangle, triangle_size, unpack_triangle
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.files import link
from grasp_lightning.run_folder.names import STATISTICS
from grasp_lightning.stats.base import Moments
from grasp_lightning.storage.tensor_files import MEASURE_AGAIN, TensorFile, save_tensors

_NAME = "statistics{part}.safetensors"
_GRAMS = ("input_gram", "gradient_gram")
_KINDS = tuple(field.name for field in fields(Moments))


class StoredMoments(Mapping[str, Moments]):
    """Moments in files of ``MomentFiles``, read on access; a damaged file raises ``PlanError``.

    Attributes:
        steps: Keys of the steps that measured them.
    """

    def __init__(self, paths: Sequence[Path], advice: str = MEASURE_AGAIN) -> None:
        self._places: dict[str, tuple[TensorFile, Mapping[str, str]]] = {}
        self.steps: set[str] = set()
        for path in paths:
            file = TensorFile(path, "step", "keys", advice=advice)
            metadata = file.metadata()
            self.steps.add(metadata["step"])
            self._places |= {m: (file, names) for m, names in _keys(file, metadata).items()}

    def __getitem__(self, module: str) -> Moments:
        """Read the moments of one linear."""
        file, names = self._places[module]
        tensors = file.read(names.values())
        found = {
            k: file.check(tensors, name, torch.float32, *(-1 for _ in file.shapes[name]))
            for k, name in names.items()
        }
        return Moments(**{k: unpack_triangle(v) if k in _GRAMS else v for k, v in found.items()})

    def check(self, module: str, shape: Sequence[int]) -> None:
        """Check that the stored shapes fit a weight; this reads no moments.

        Args:
            module: Full name of a linear or of experts.
            shape: ``(N, M)``, or ``(E, N, M)`` of experts.

        Raises:
            PlanError: If they do not.
        """
        *stack, num_outputs, num_inputs = shape
        file, names = self._places[module]
        for kind, name in names.items():
            size = num_outputs if kind == "gradient_gram" else num_inputs
            packed = triangle_size(size) if kind in _GRAMS else size
            expected = (packed,) if kind == "gradient_gram" else (*stack, packed)
            if file.shapes[name] != expected:
                raise PlanError(
                    file.damaged(f"{name} must have shape {expected}, got {file.shapes[name]}")
                )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all linears."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of linears."""
        return len(self._places)

    def kinds(self, module: str) -> frozenset[str]:
        """Return which fields of ``Moments`` are stored of a linear; none if it is unknown."""
        return frozenset(self._places[module][1]) if module in self._places else frozenset()


def _keys(file: TensorFile, metadata: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return, per linear, kind of moment -> name of its tensor."""
    try:
        keys = {module: dict(names) for module, names in json.loads(metadata["keys"]).items()}
        kinds = {kind for names in keys.values() for kind in names}
        tensors = {name for names in keys.values() for name in names.values()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(file.damaged(f"its metadata cannot be read ({error})")) from error
    if not (kinds <= set(_KINDS) and tensors <= file.shapes.keys()):
        raise PlanError(file.damaged("its tensors do not match its metadata"))
    return keys


def stored_moments(folder: Path, advice: str = MEASURE_AGAIN) -> StoredMoments:
    """Return the moments in a run folder; empty if it has none."""
    return StoredMoments(sorted(folder.glob(STATISTICS)), advice)


class MomentFiles:
    """The moments of a run, in one file per group of layers."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def load(self, part: str, step: str) -> StoredMoments | None:
        """Return what an earlier start measured in a step; all processes must call this.

        Args:
            part: Group of layers; empty if there is only one.

        Returns:
            The moments; None if there are none, or they belong to another step.
        """
        processes.barrier()  # rank 0 may be writing them
        path = self._run.path(_NAME.format(part=part))
        if not TensorFile(path):
            return None
        stored = StoredMoments([path])
        return stored if stored.steps == {step} else None

    def save(self, moments: Mapping[str, Moments], part: str, step: str) -> None:
        """Save the complete moments of a step, in rank 0 only; shared tensors are stored once.

        Args:
            part: Group of layers; empty if there is only one.
        """
        if not processes.is_first():
            return
        tensors: dict[str, Tensor] = {}
        keys: dict[str, dict[str, str]] = {}
        names: dict[int, str] = {}
        for module in sorted(moments):  # shared tensors get the same name after a kill, too
            found, keys[module] = moments[module], {}
            for kind in _KINDS:
                value: Tensor | None = getattr(found, kind)
                if value is None:
                    continue
                name = names.setdefault(id(value), f"{module}.{kind}")
                keys[module][kind] = name
                if name not in tensors:
                    tensors[name] = (pack_triangle(value) if kind in _GRAMS else value).cpu()
        metadata = {"step": step, "keys": json.dumps(keys)}
        self._run.write_with(
            _NAME.format(part=part), lambda path: save_tensors(path, tensors, metadata)
        )

    def paths(self, step: str) -> list[Path]:
        """Return the files of a step."""
        files = sorted(self._run.root.glob(STATISTICS))
        return [path for path in files if StoredMoments([path]).steps == {step}]

    def adopt(self, files: Sequence[Path]) -> StoredMoments:
        """Replace all of them by files of another run, and read these; all processes must call it.

        Where the file system allows it, the files are hard links and take no space.
        """

        def take() -> list[Path]:
            self.remove()
            return [self._run.write_with(file.name, partial(link, file)) for file in files]

        processes.barrier()  # another process may be reading the old ones
        return StoredMoments(processes.on_first(take))

    def remove(self) -> None:
        """Delete all of them."""
        self._run.remove_all(STATISTICS)
