"""Writes into a run folder: recorded first, then atomic."""

import fnmatch
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from grasp_lightning.run_folder.files import (
    as_output_error,
    partial_name,
    remove_file,
    remove_folder,
    sync,
    write_file,
)
from grasp_lightning.run_folder.manifest import Manifest
from grasp_lightning.run_folder.names import is_reserved
from grasp_lightning.run_folder.rules import refuse_foreign


class RunWriter:
    """Files and folders of one run, each recorded in the manifest before it is written.

    Names are relative paths with ``/``; ``root`` is absolute, with links resolved.
    """

    root: Path

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self._manifest = manifest
        self._is_amended = False

    def path(self, name: str) -> Path:
        """Return the path of a file or folder of the run, which may be absent.

        Raises:
            ValueError: If the name leads out of the folder.
        """
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise ValueError(f"expected a relative path inside the run folder, got {name!r}")
        return self.root / name

    def write_text(self, name: str, text: str) -> Path:
        """Write or replace a text file atomically, and return its path."""
        return self.write_with(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, content: object) -> Path:
        """Write plain data as JSON atomically: indented, keys sorted, no NaN. Return its path."""
        return self.write_text(
            name, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
        )

    def claim(self, name: str) -> None:
        """Record a file that another process of the run is going to write."""
        with as_output_error(self.path(name)):
            self._claim(name)

    def write_with(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let ``write`` fill a temporary file, move it into place, and return its final path.

        A full disk or a missing permission raises ``OutputError`` and leaves no part of the file.
        """
        target = self.path(name)
        with as_output_error(target):
            self._claim(name)
        self.write_claimed(name, write)
        return target

    def write_claimed(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file, as ``write_with`` does, that rank 0 has claimed for this process."""
        write_file(self.path(name), write, root=self.root)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """Yield an empty private folder that is moved into place when the block ends.

        It replaces what the run wrote there before. After an error it is deleted, and the old
        content stays.
        """
        target, work = self.path(name), partial_name(name)
        self._require_writable(name)
        temporary = self.path(work)
        with as_output_error(target):
            refuse_foreign(self.root, self._manifest, name, as_whole=True)
            self._record_parents(name)
            self._manifest.work.add(work)
            self._manifest.write(self.root)
            temporary.mkdir(mode=0o700)
            try:
                yield temporary
                self._adopt(temporary, name)
            finally:
                remove_folder(self.root, work)
                self._manifest.work.discard(work)
                self._manifest.write(self.root)

    def live_folder(self, name: str) -> Path:
        """Return a folder that libraries write into during the run; all of it belongs to the run.

        Unlike ``new_folder``, it is visible during the run, and keeps the files of an earlier
        start.
        """
        target = self.path(name)
        self._require_writable(name)
        with as_output_error(target):
            refuse_foreign(self.root, self._manifest, name)
            self._record_parents(name)
            self._manifest.live.add(name)
            self._manifest.write(self.root)
            target.mkdir(parents=True, exist_ok=True)
        return target

    def _adopt(self, temporary: Path, name: str) -> None:
        for old in [file for file in self._manifest.files if file.startswith(f"{name}/")]:
            remove_file(self.root, old)
            self._manifest.files.discard(old)
        for path in temporary.rglob("*"):
            listed = self._manifest.folders if path.is_dir() else self._manifest.files
            listed.add(f"{name}/{path.relative_to(temporary).as_posix()}")
            sync(path)
        sync(temporary)
        self._manifest.folders.add(name)
        self._manifest.write(self.root)
        for inner in sorted(self.path(name).rglob("*"), reverse=True):
            remove_folder(self.root, inner.relative_to(self.root).as_posix(), if_empty=True)
        temporary.replace(self.path(name))

    def remove(self, name: str) -> None:
        """Delete a file that the run wrote, if it exists.

        Raises:
            ValueError: If the run did not write that file.
        """
        self._require_writable()
        if name not in self._manifest.files:
            raise ValueError(f"{name!r} is not a file of this run")
        self._remove([name])

    def remove_all(self, pattern: str) -> None:
        """Delete the files that the run wrote under names of one glob pattern."""
        self._require_writable()
        self._remove(sorted(fnmatch.filter(self._manifest.files, pattern)))

    def _remove(self, files: Sequence[str]) -> None:
        for name in files:
            with as_output_error(self.path(name)):
                remove_file(self.root, name)
                self._manifest.files.discard(name)
                self._manifest.write(self.root)

    def _claim(self, name: str) -> None:
        self._require_writable(name)
        refuse_foreign(self.root, self._manifest, name)
        if name not in self._manifest.files:
            self._record_parents(name)
            self._manifest.files.add(name)
            self._manifest.write(self.root)
        self.path(name).parent.mkdir(parents=True, exist_ok=True)

    def _record_parents(self, name: str) -> None:
        parents = {str(parent) for parent in PurePosixPath(name).parents} - {"."}
        self._manifest.folders |= {parent for parent in parents if not self.path(parent).exists()}

    def _require_writable(self, name: str | None = None) -> None:
        if name is not None and not is_reserved(name):
            raise ValueError(f"{name!r} is not among the names of run_folder.names")
        if self._manifest.state == "finished" and not self._is_amended:
            raise ValueError(f"the run in {self.root} is finished and cannot be written")
