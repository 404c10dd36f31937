"""The folder of one run: safe to start, kill, resume and overwrite.

It imports neither torch nor transformers, so that looking up a finished run is fast.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder import names
from grasp_lightning.run_folder.files import as_output_error, remove_partials
from grasp_lightning.run_folder.lock import (
    FolderLock,
    check_unlocked,
    check_writable,
    make_folders,
    remove_made,
    safe_root,
)
from grasp_lightning.run_folder.manifest import Manifest
from grasp_lightning.run_folder.rules import RunState, classify, config_hash
from grasp_lightning.run_folder.writer import RunWriter

__all__ = ["RunFolder", "RunState"]

_MEGABYTE = 1_000_000


class RunFolder(RunWriter):
    """One run's folder, locked while it is written; ``open`` makes one.

    Every path is recorded in the manifest before it is written, and every file is written
    atomically. So a killed run is distinguished from a finished one and can be resumed, and
    deleting a run never touches a foreign file.

    Attributes:
        state: What ``open`` found; new and unfinished become finished by ``finish``. A finished run
            cannot be written.
    """

    state: RunState

    def __init__(self, root: Path, state: RunState, manifest: Manifest) -> None:
        super().__init__(root, manifest)
        self.state = state
        self._lock: FolderLock | None = None
        self._made: list[Path] = []

    @classmethod
    def open(
        cls,
        output_dir: str | Path,
        config: Mapping[str, Any],  # Any: resolved configuration
        *,
        overwrite: bool = False,
        protected: Sequence[str | Path] = (),
        job: str = "",
    ) -> Self:
        """Start a run in a folder, resume it, or find it finished.

        An ``OutputError`` refuses a folder that is, contains or is inside a protected folder; is or
        contains the home or working directory; has foreign files or a run with a different
        configuration; cannot be created; or is in use by another process.

        Args:
            output_dir: The run folder; absent folders are made.
            config: The resolved configuration as plain data, compared without keys that only say
                where a run is written.
            overwrite: Delete the files of an earlier run in any state, and start again.
            protected: Folders and files that must not change; absent ones are ignored.
            job: Batch job of this process; see ``is_begun_by``.

        Returns:
            A finished run without a lock, and nothing written; else a locked folder with a
            config.yaml.
        """
        with as_output_error(Path(output_dir)):
            root = safe_root(output_dir, protected)
            # Before the lock, so that a refused or finished run writes nothing at all.
            manifest, found = classify(root, config, overwrite)
        if manifest is not None and found == "finished":
            return cls(root, "finished", manifest)
        made, lock = make_folders(root), None
        try:
            lock = FolderLock(root)
            # Again: another process may have written before the lock was held.
            manifest, found = classify(root, config, overwrite)
            folder = cls._started(root, config, manifest, found, job)
        except BaseException:
            if lock is not None:
                lock.release()
            remove_made(made)
            raise
        folder._lock, folder._made = lock, made
        if folder.state == "finished":
            folder.close()
        return folder

    @staticmethod
    def look_up(
        output_dir: str | Path,
        config: Mapping[str, Any],  # Any: resolved configuration
        *,
        overwrite: bool = False,
        protected: Sequence[str | Path] = (),
    ) -> tuple[Path, RunState]:
        """Return the absolute folder and the state that ``open`` would find; write nothing.

        It refuses what ``open`` refuses.
        """
        with as_output_error(Path(output_dir)):
            root = safe_root(output_dir, protected)
            _, state = classify(root, config, overwrite)
        if state != "finished":
            check_writable(root)
            check_unlocked(root)
        return root, state

    @classmethod
    def reopen(cls, root: Path) -> Self | None:
        """Open and lock a finished run to amend its files; None if the folder holds none."""
        manifest = Manifest.read(root)
        if manifest is None or manifest.state != "finished":
            return None
        folder = cls(root, "finished", manifest)
        folder._lock = FolderLock(root)
        folder._is_amended = True
        return folder

    @classmethod
    def _started(
        cls,
        root: Path,
        config: Mapping[str, Any],  # Any: resolved configuration
        manifest: Manifest | None,
        found: RunState,
        job: str,
    ) -> Self:
        if manifest is not None and found == "finished":
            return cls(root, found, manifest)
        with as_output_error(root):
            if manifest is not None and found == "unfinished":
                manifest.delete_partial(root)
            else:
                if manifest is not None:
                    manifest.delete_listed(root)
                remove_partials(root)
                manifest = Manifest(config_hash=config_hash(config), job=job)
        folder = cls(root, found, manifest)
        if not folder.path(names.CONFIG).exists():
            folder.write_text(names.CONFIG, yaml.safe_dump(dict(config), sort_keys=True))
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder to other processes; its files stay."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def finish(self) -> None:
        """Mark the run finished: from now on it is read-only."""
        self._require_writable()
        finished = replace(self._manifest, state="finished")
        with as_output_error(self.root):
            finished.write(self.root)
        self._manifest = finished
        self.state = "finished"

    def discard(self) -> None:
        """Delete all that the run wrote, the folders that ``open`` made, and close.

        For a run that fails at the start by a user error. A resumed run loses its earlier part,
        too.
        """
        self._require_writable()
        with as_output_error(self.root):
            self._manifest.delete_listed(self.root)
        self.close()
        remove_made(self._made)

    def check_free_space(self, bytes_needed: int) -> None:
        """Raise an ``OutputError`` if the disk has too little room, before time is spent."""
        check_free_space(self.root, bytes_needed)


def check_free_space(root: Path, bytes_needed: int, key: str = "output_dir") -> None:
    """Check that the disk of a folder, which may be absent and is named by a key, has room.

    Raises:
        OutputError: If it does not.
    """
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise OutputError(
            f"{root} needs {bytes_needed / _MEGABYTE:.1f} MB, but {free / _MEGABYTE:.1f} MB are "
            f"free; free some space or use another {key}"
        )
