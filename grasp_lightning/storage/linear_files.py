"""Files with what a decision computes for single linears, and tensors that are read from files."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Final

from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.reading.on_access import OnAccess
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import CHECKPOINTS
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors

DECIDED: Final = f"{CHECKPOINTS}/decided-*"
_NAME: Final = CHECKPOINTS + "/decided-{digest}.safetensors"
_KEY, _ADVICE = "key", "delete it to compute that linear again"


class LinearFiles:
    """The tensors that a decision computes for each linear, in one file each.

    Args:
        run: The run.
        key: Identifies the step within the run.
    """

    def __init__(self, run: RunFolder, key: str) -> None:
        self._run = run
        self._key = key

    def load(self, work: str, module: str) -> Mapping[str, Tensor] | None:
        """Return the tensors of a linear, read on access; None if they are not computed yet."""
        file = TensorFile(self._run.path(self._file(work, module)), _KEY, advice=_ADVICE)
        if not file or file.metadata()[_KEY] != self._key:
            return None
        return read_on_access(file, {name: name for name in file.shapes})

    def save(self, work: str, module: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Keep the tensors of a linear, and return them, read on access."""
        self._run.write_with(
            self._file(work, module), lambda path: save_tensors(path, tensors, {_KEY: self._key})
        )
        kept = self.load(work, module)
        assert kept is not None  # it was written just now
        return kept

    def _file(self, work: str, module: str) -> str:
        digest = hashlib.sha256(f"{work}:{module}".encode()).hexdigest()[:32]
        return _NAME.format(digest=digest)


def read_on_access(file: TensorFile, names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Return tensors of a file, each in memory of its own and read on access.

    Args:
        file: A file whose metadata was checked.
        names: The name of each tensor in the file, by the name that it gets.
    """
    return OnAccess({name: partial(_read, file, stored) for name, stored in names.items()})


def _read(file: TensorFile, name: str) -> Tensor:
    found = file.read([name])[name]
    if tuple(found.shape) != file.shapes[name]:
        raise PlanError(file.damaged(f"{name} has changed"))
    return found.clone()  # what is read is mapped from the file
