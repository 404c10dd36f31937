"""Writes into a run folder that are recorded first and take their place complete."""

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

    Args:
        root: An existing folder.
        manifest: The list of what is written.

    Attributes:
        root: The folder, absolute, links resolved.
    """

    root: Path

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self._manifest = manifest
        self._is_amended = False

    def path(self, name: str) -> Path:
        """Return the path of a file or folder of the run, which need not exist.

        Args:
            name: Relative path, ``/`` between parts.

        Returns:
            The path inside ``root``.

        Raises:
            ValueError: If the name leads out of the folder.
        """
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise ValueError(f"expected a relative path inside the run folder, got {name!r}")
        return self.root / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file in one step, replacing what the run wrote there before.

        Args:
            name: Relative path.
            text: Content.

        Returns:
            Path of the file.
        """
        return self.write_with(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, content: object) -> Path:
        """Write plain data as JSON in one step: indented, keys sorted, no NaN.

        Args:
            name: Relative path.
            content: What ``json.dumps`` takes.

        Returns:
            Path of the file.
        """
        return self.write_text(
            name, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
        )

    def claim(self, name: str) -> None:
        """Record a file that another process of the run is going to write.

        Args:
            name: Relative path.
        """
        with as_output_error(self.path(name)):
            self._claim(name)

    def write_with(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let a library write a file, which takes its place only when it is complete.

        A full disk or a missing permission is an ``OutputError``; nothing of the file is left then.

        Args:
            name: Relative path.
            write: Writes one file at the path that it is given.

        Returns:
            Path of the file.
        """
        target = self.path(name)
        with as_output_error(target):
            self._claim(name)
        self.write_claimed(name, write)
        return target

    def write_claimed(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file that is recorded already, in the process that it was recorded for.

        Args:
            name: Relative path, which rank 0 has given to ``claim``.
            write: Writes one file at the path that it is given.
        """
        write_file(self.path(name), write, root=self.root)

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """Give a temporary folder that takes its place, complete, when the block ends.

        What the run wrote at that place before is replaced. After an error the temporary folder is
        deleted, and the place stays as it was.

        Args:
            name: Relative path of the folder, such as ``model``.

        Yields:
            An empty folder that only this user may open.
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
        """Give a folder that libraries write into while the run goes on; all in it is of the run.

        Unlike ``new_folder`` it can be looked at meanwhile, and keeps what an earlier start wrote.

        Args:
            name: Relative path of the folder, such as ``logs``.

        Returns:
            The folder.
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
        """Delete a file that the run wrote, if it is there.

        Args:
            name: Relative path.

        Raises:
            ValueError: If the run did not write that file.
        """
        self._require_writable()
        if name not in self._manifest.files:
            raise ValueError(f"{name!r} is not a file of this run")
        self._remove([name])

    def remove_all(self, pattern: str) -> None:
        """Delete the files that the run wrote under names of one pattern.

        Args:
            pattern: Relative paths, ``*`` for any text.
        """
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
