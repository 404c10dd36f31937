"""The run folder in the processes that do not write it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from grasp_lightning.run_folder.folder import RunFolder
from grasp_lightning.run_folder.manifest import Manifest
from grasp_lightning.run_folder.rules import RunState


class FollowedRun(RunFolder):
    """A run folder that another process has opened: reads work, and writes are dropped.

    All processes of a run can then execute the same code.
    """

    def __init__(self, root: Path, state: RunState) -> None:
        super().__init__(root, state, Manifest(config_hash=""))

    def write_with(self, name: str, write: Callable[[Path], object]) -> Path:
        """Return where the other process writes."""
        del write
        return self.path(name)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that is deleted afterwards."""
        with TemporaryDirectory() as folder:
            yield Path(folder) / name

    def live_folder(self, name: str) -> Path:
        """Return where libraries write in the other process."""
        return self.path(name)

    def claim(self, name: str) -> None:
        """Do nothing."""

    def remove(self, name: str) -> None:
        """Do nothing."""

    def remove_all(self, pattern: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Mark the run finished in this process only."""
        self.state = "finished"

    def discard(self) -> None:
        """Do nothing."""

    def check_free_space(self, bytes_needed: int) -> None:
        """Do nothing."""
