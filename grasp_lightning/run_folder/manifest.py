"""The list of what a run wrote into its folder.

Nothing outside this list is ever deleted.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Self, get_args

from grasp_lightning.errors import OutputError

MANIFEST_NAME = "manifest.json"

ManifestState = Literal["unfinished", "finished", "deleting"]

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)

_FORMAT = "grasp_lightning run 1"


@dataclass
class Manifest:
    """What one run has written, or is about to write.

    Attributes:
        config_hash: Fingerprint of the resolved configuration.
        state: deleting means that a deletion has begun, so that nothing of the run counts any more.
        files: Relative paths of files, ``/`` between parts.
        folders: Relative paths of folders that the run made; deleted only when empty.
        work: Relative paths of temporary folders, deleted with all they hold.
        live: Relative paths of folders that libraries write into, with all they hold.
        job: Job of a batch system that has begun the run; empty if none has.
    """

    config_hash: str
    state: ManifestState = "unfinished"
    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    work: set[str] = field(default_factory=set)
    live: set[str] = field(default_factory=set)
    job: str = ""

    @property
    def listed(self) -> set[str]:
        """All relative paths of the run."""
        return self.files | self.folders | self.work | self.live

    def counts(self, root: Path) -> bool:
        """Return whether there is anything to go on with: not half deleted, and something written.

        Args:
            root: The run folder.

        Returns:
            False if a run in this folder starts anew whatever its configuration.
        """
        return self.state != "deleting" and any((root / name).exists() for name in self.listed)

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """Return the manifest of a run folder.

        Args:
            root: The run folder.

        Returns:
            The manifest, or None if the folder has none.

        Raises:
            OutputError: If the file is damaged, foreign, or lists a path outside the folder.
        """
        file = root / MANIFEST_NAME
        try:
            return cls._from_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"cannot read {file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{file} is damaged, or not of this program ({error}); use another output_dir"
            ) from error

    @classmethod
    def _from_json(cls, text: str) -> Self:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}")
        if content["state"] not in get_args(ManifestState):
            raise ValueError(f"unknown state {content['state']!r}")
        lists = {key: set(_inside(content[key])) for key in ("files", "folders", "work")}
        lists["live"] = set(_inside(content.get("live", [])))  # runs of earlier versions have none
        return cls(
            config_hash=str(content["config_hash"]),
            state=content["state"],
            job=str(content.get("job", "")),
            **lists,
        )

    def write(self, root: Path) -> None:
        """Replace the manifest of a run folder in one step.

        Args:
            root: The run folder.
        """
        content = {
            "format": _FORMAT,
            "config_hash": self.config_hash,
            "state": self.state,
            "files": sorted(self.files),
            "folders": sorted(self.folders),
            "work": sorted(self.work),
            "live": sorted(self.live),
            "job": self.job,
        }
        temporary = partial_path(root / MANIFEST_NAME)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        replace_synced(temporary, root / MANIFEST_NAME)

    def delete_listed(self, root: Path) -> None:
        """Delete what the manifest lists, then the manifest; foreign files and their folders stay.

        Args:
            root: The run folder.
        """
        self.state = "deleting"
        self.write(root)
        self.delete_partial(root)
        _delete_folders(root, self.live)
        for name in self.files:
            if _is_own(root, name) and ((path := root / name).is_symlink() or not path.is_dir()):
                path.unlink(missing_ok=True)
        for name in sorted(self.folders, key=len, reverse=True):  # inner folders first
            remove_if_empty(root / name)
        (root / MANIFEST_NAME).unlink()

    def delete_partial(self, root: Path) -> None:
        """Delete what a killed run left half written.

        Args:
            root: The run folder.
        """
        _delete_folders(root, self.work)
        for name in self.files:
            if _is_own(root, name):
                partial_path(root / name).unlink(missing_ok=True)


def _delete_folders(root: Path, names: Iterable[str]) -> None:
    for name in names:
        folder = root / name
        if _is_own(root, name) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def partial_path(path: Path) -> Path:
    """Return where a file is built before it takes its place, in the same folder."""
    return path.with_name(f".partial.{path.name}")  # keeps the suffix: some writers go by it


def replace_synced(temporary: Path, target: Path) -> None:
    """Move a complete file to its place, after its bytes have reached the disk.

    Args:
        temporary: The complete file.
        target: Its place, in the same file system.
    """
    sync(temporary)
    temporary.replace(target)


def sync(file: Path) -> None:
    """Give a complete file the usual permissions, and wait until its bytes are on the disk.

    Args:
        file: Any regular file.
    """
    # safetensors writes files that only their owner can read; run folders are shared.
    file.chmod(0o666 & ~_UMASK)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder unless it is absent, a link, or holds anything.

    Args:
        folder: Any path.
    """
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _inside(names: object) -> Iterator[str]:
    if not isinstance(names, list):
        raise TypeError("a list of paths is missing")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"it lists {name!r}, which is not inside the folder")
        yield name


def _is_own(root: Path, name: str) -> bool:
    """Whether a listed path is still in the run folder: a link could lead its parent elsewhere."""
    return (root / name).parent.resolve().is_relative_to(root.resolve())
