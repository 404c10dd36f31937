"""Files with what a decision computes for single linears, and tensors that are read from files."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

from torch import Tensor

from grasp_lightning import processes
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

    def missing(self, work: str, modules: Iterable[str]) -> list[str]:
        """Return the linears that are not computed yet; all processes must call it."""
        return [name for name in modules if not self._is_saved(work, name)]

    def claim(self, work: str, modules: Iterable[str]) -> None:
        """Record that processes of the run will save some linears; all processes must call it."""
        processes.barrier()  # another one may still look for files
        for name in modules:
            self._run.claim(self._file(work, name))
        processes.barrier()

    def save(self, work: str, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Save the tensors of a linear that was claimed, in the process that computed them."""
        self._run.write_claimed(
            self._file(work, module), lambda path: save_tensors(path, tensors, {_KEY: self._key})
        )

    def load(self, work: str, modules: Iterable[str]) -> dict[str, Mapping[str, Tensor]]:
        """Return the saved tensors of linears, read on access; all processes must call it."""
        processes.barrier()  # another one may be writing them
        return {name: self._saved(work, name) for name in modules}

    def _is_saved(self, work: str, module: str) -> bool:
        file = self._tensors(work, module)
        return bool(file) and file.metadata()[_KEY] == self._key

    def _saved(self, work: str, module: str) -> Mapping[str, Tensor]:
        file = self._tensors(work, module)
        file.metadata()
        return read_on_access(file, {name: name for name in file.shapes})

    def _tensors(self, work: str, module: str) -> TensorFile:
        return TensorFile(self._run.path(self._file(work, module)), _KEY, advice=_ADVICE)

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
