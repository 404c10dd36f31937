"""Files with the state of the running pass, one per process.

Each process saves the windows that it has counted. A restarted run may have another number of
processes: rank 0 starts from the sum of all files, and its first own file supersedes the files of
earlier starts.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import PlanError
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors

_NAME = re.compile(r"pass-(\d+)-(\d+)\.safetensors")
_CONCATENATED = "windows"  # all other tensors are sums


class PassFile(NamedTuple):
    """One file of one process; ``start`` is the number of starts of the run before this one."""

    start: int
    rank: int

    @property
    def name(self) -> str:
        """Name of the file in its folder."""
        return f"pass-{self.start}-{self.rank}.safetensors"

    @classmethod
    def found_in(cls, folder: Path) -> list[Self]:
        """Return all files in a folder, which may be absent, in order."""
        names = [_NAME.fullmatch(path.name) for path in folder.glob("pass-*")]
        return sorted(cls(int(name[1]), int(name[2])) for name in names if name)


class PassFiles:
    """The state of the running pass, over all processes and starts."""

    def __init__(self, run: RunFolder, folder: str) -> None:
        self._run = run
        self._folder = folder
        self._start = 0

    def load(self, step: str) -> dict[str, Tensor] | None:
        """Return the sum of what all processes saved of a step, and begin a new start.

        All processes must call this: no file is written before all have read.

        Returns:
            The state, the same in all processes; None if nothing of this step was saved.
        """
        found = PassFile.found_in(self._path())
        for file in found:  # one that the run did not write is refused
            processes.on_first(partial(self._run.claim, self._name(file)))
        own = [file for file in found if self._tensors(file).metadata()["step"] == step]
        state = _added_up([self._tensors(file) for file in _counting(own)])
        self._start = max((file.start for file in found), default=-1) + 1
        processes.barrier()
        if processes.is_first():
            self._remove(file for file in found if file not in own)
            for rank in range(processes.num_processes()):
                self._run.claim(self._name(PassFile(self._start, rank)))
        processes.barrier()
        return state

    def save(self, state: Mapping[str, Tensor], step: str) -> None:
        """Save what this process has counted in a step, in rank 0 including what was loaded.

        Args:
            state: Sums over windows; ``windows`` names the windows in them.
        """
        file = PassFile(self._start, processes.rank())
        self._run.write_claimed(
            self._name(file), lambda path: save_tensors(path, state, {"step": step})
        )
        if processes.is_first():
            earlier = PassFile.found_in(self._path())
            self._remove(other for other in earlier if other.start < self._start)

    def _remove(self, files: Iterable[PassFile]) -> None:
        for file in files:
            self._run.remove(self._name(file))

    def _name(self, file: PassFile) -> str:
        return f"{self._folder}/{file.name}"

    def _path(self) -> Path:
        return self._run.path(self._folder)

    def _tensors(self, file: PassFile) -> TensorFile:
        return TensorFile(self._run.path(self._name(file)), "step")


def _counting(files: list[PassFile]) -> list[PassFile]:
    """Return the files whose windows are not in a later file of rank 0."""
    last = max((file.start for file in files if file.rank == 0), default=0)
    return [file for file in files if file.start >= last]


def _added_up(files: list[TensorFile]) -> dict[str, Tensor] | None:
    total: dict[str, Tensor] = {}
    for file in files:
        state = file.read()
        file.check(state, _CONCATENATED, torch.int64, -1)
        if total and state.keys() != total.keys():
            raise PlanError(file.damaged("its sums are not those of the files next to it"))
        for key, value in state.items():
            if key not in total:
                total[key] = value
            elif key == _CONCATENATED:
                total[key] = torch.cat([total[key], value])
            else:
                total[key] = total[key] + value
    return total or None
