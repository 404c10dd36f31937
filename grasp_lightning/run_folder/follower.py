"""The run folder as the processes see it that do not write it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from grasp_lightning.run_folder.folder import RunFolder
from grasp_lightning.run_folder.manifest import Manifest
from grasp_lightning.run_folder.rules import RunState


class FollowedRun(RunFolder):
    """A run folder that another process has opened: it is read, and what is written is dropped.

    So that all processes of a run can do the same.

    Args:
        root: The folder, absolute.
        state: What the other process found there.
    """

    def __init__(self, root: Path, state: RunState) -> None:
        super().__init__(root, state, Manifest(config_hash=""))

    def write_with(self, name: str, write: Callable[[Path], object]) -> Path:
        """Do nothing.

        Args:
            name: Relative path.
            write: Not called.

        Returns:
            Where the other process writes.
        """
        del write
        return self.path(name)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """Give a folder that is deleted again.

        Args:
            name: Relative path of the folder.

        Yields:
            An empty folder.
        """
        with TemporaryDirectory() as folder:
            yield Path(folder) / name

    def live_folder(self, name: str) -> Path:
        """Return where the other process lets libraries write.

        Args:
            name: Relative path of the folder.

        Returns:
            The folder.
        """
        return self.path(name)

    def claim(self, name: str) -> None:
        """Do nothing."""

    def remove(self, name: str) -> None:
        """Do nothing."""

    def remove_all(self, pattern: str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Know that the run is finished."""
        self.state = "finished"

    def discard(self) -> None:
        """Do nothing."""

    def check_free_space(self, bytes_needed: int) -> None:
        """Do nothing."""
