"""``statistics.safetensors``: what a curvature pass has measured, for this run and for later ones.

Gram matrices are stored as packed triangles, once for all linears that read the same input. Where
the linears did not fit into memory at once, there is one file for each group of layers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import PlanError
from grasp_lightning.linalg.triangles import pack_triangle, unpack_triangle
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Moments
from grasp_lightning.storage.tensor_files import metadata_of

_NAME = "statistics{part}.safetensors"
_PATTERN = "statistics*.safetensors"
_GRAMS = ("input_gram", "gradient_gram")
_KINDS = tuple(field.name for field in fields(Moments))


class StoredMoments(Mapping[str, Moments]):
    """Moments in files, each read when it is asked for.

    Args:
        paths: Files that ``MomentFiles`` has written.

    Raises:
        PlanError: If one is damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Path, Mapping[str, str]]] = {}
        for path in paths:
            metadata = metadata_of(path)
            try:
                keys = json.loads(metadata["keys"])
            except (KeyError, ValueError) as error:
                raise PlanError(
                    f"{path} is damaged: {error}; delete it to measure again"
                ) from error
            self._places |= {module: (path, names) for module, names in keys.items()}

    def __getitem__(self, module: str) -> Moments:
        """Read the moments of one linear."""
        path, names = self._places[module]
        with safe_open(path, framework="pt") as content:
            found = {kind: content.get_tensor(name) for kind, name in names.items()}
        return Moments(**{k: unpack_triangle(v) if k in _GRAMS else v for k, v in found.items()})

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all linears."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of linears."""
        return len(self._places)

    def kinds(self, module: str) -> frozenset[str]:
        """Return what is stored of a linear, without reading it.

        Args:
            module: Its name.

        Returns:
            Names of fields of ``Moments``; none for a linear that is not here.
        """
        return frozenset(self._places[module][1]) if module in self._places else frozenset()


def stored_moments(folder: Path) -> StoredMoments:
    """Return the moments in a run folder.

    Args:
        folder: The run folder.

    Returns:
        The moments; none if it has no file of them.
    """
    return StoredMoments(sorted(folder.glob(_PATTERN)))


class MomentFiles:
    """The moments of a run, by groups of layers.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def load(self, part: str, step: str) -> StoredMoments | None:
        """Return what an earlier start of the run has measured; all processes must call it.

        Args:
            part: Which group of layers; empty if there is one.
            step: Key of the step that runs.

        Returns:
            The moments; None if they are not there, or belong to another step.
        """
        processes.barrier()  # rank 0 may be writing them
        path = self._run.path(_NAME.format(part=part))
        if not path.is_file():
            return None
        return StoredMoments([path]) if metadata_of(path).get("step") == step else None

    def save(self, moments: Mapping[str, Moments], part: str, step: str) -> None:
        """Store moments that are complete; rank 0 alone does.

        Args:
            moments: What was measured, by module; shared tensors are stored once.
            part: Which group of layers; empty if there is one.
            step: Key of the step that runs.
        """
        if not processes.is_first():
            return
        tensors: dict[str, Tensor] = {}
        keys: dict[str, dict[str, str]] = {}
        names: dict[int, str] = {}
        for module, found in moments.items():
            keys[module] = {}
            for kind in _KINDS:
                value: Tensor | None = getattr(found, kind)
                if value is None:
                    continue
                name = names.setdefault(id(value), f"{module}.{kind}")
                keys[module][kind] = name
                if name not in tensors:
                    packed = pack_triangle(value) if kind in _GRAMS else value
                    tensors[name] = packed.cpu().contiguous()
        metadata = {"step": step, "keys": json.dumps(keys)}
        self._run.write_with(
            _NAME.format(part=part), lambda path: save_file(tensors, path, metadata=metadata)
        )

    def remove(self) -> None:
        """Delete all of them."""
        for path in sorted(self._run.root.glob(_PATTERN)):
            self._run.remove(path.name)
