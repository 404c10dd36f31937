"""The list of what a run wrote into its folder.

Nothing outside this list is ever deleted.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Self, get_args

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder.files import (
    in_the_way,
    remove_file,
    remove_folder,
    remove_partials,
    write_file,
)

MANIFEST_NAME = "manifest.json"

ManifestState = Literal["unfinished", "finished", "deleting"]

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
        if file.is_symlink():
            raise OutputError(in_the_way(file))
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, encoding="utf-8") as stream:
                return cls._from_json(stream.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"cannot read {file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
        text = json.dumps(content, indent=2) + "\n"
        write_file(root / MANIFEST_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    def delete_listed(self, root: Path) -> None:
        """Delete what the manifest lists, then the manifest; foreign files and their folders stay.

        Args:
            root: The run folder.
        """
        self.state = "deleting"
        self.write(root)
        self.delete_partial(root)
        for name in self.live:
            remove_folder(root, name)
        for name in self.files:
            remove_file(root, name)
        for name in sorted(self.folders, key=len, reverse=True):  # inner folders first
            remove_folder(root, name, if_empty=True)
        (root / MANIFEST_NAME).unlink()

    def delete_partial(self, root: Path) -> None:
        """Delete what a killed run left half written.

        Args:
            root: The run folder.
        """
        for name in self.work:
            remove_folder(root, name)
        for folder in {"", *(str(PurePosixPath(name).parent) for name in self.files)}:
            remove_partials(root, folder)


def _inside(names: object) -> Iterator[str]:
    if not isinstance(names, list):
        raise TypeError("a list of paths is missing")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"it lists {name!r}, which is not inside the folder")
        yield name
