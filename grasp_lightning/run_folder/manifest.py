"""The list of what a run wrote into its folder; nothing else is ever deleted."""

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
_LISTS = ("files", "folders", "work", "live")


@dataclass
class Manifest:
    """Everything that one run has written, or is about to write, as relative paths with ``/``.

    Attributes:
        config_hash: Fingerprint of the resolved configuration.
        state: "deleting" means that a deletion has begun, and the run is no longer valid.
        folders: Folders that the run made; deleted only when empty.
        work: Temporary folders, deleted with their content.
        live: Folders that libraries write into, deleted with their content.
        job: Batch job that began the run; empty if none.
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
        """Return whether a run can be resumed: it wrote something, and no deletion has begun."""
        return self.state != "deleting" and any((root / name).exists() for name in self.listed)

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """Return the manifest of a run folder; None if there is none.

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
                f"{file} is damaged, or was not written by this program ({error}); use another "
                "output_dir"
            ) from error

    @classmethod
    def _from_json(cls, text: str) -> Self:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}")
        if content["state"] not in get_args(ManifestState):
            raise ValueError(f"unknown state {content['state']!r}")
        content.setdefault("live", [])  # earlier versions had none
        lists = {key: set(_inside(content[key])) for key in _LISTS}
        return cls(
            config_hash=str(content["config_hash"]),
            state=content["state"],
            job=str(content.get("job", "")),
            **lists,
        )

    def write(self, root: Path) -> None:
        """Replace the manifest of a run folder atomically."""
        content = {
            "format": _FORMAT,
            "config_hash": self.config_hash,
            "state": self.state,
            **{key: sorted(getattr(self, key)) for key in _LISTS},
            "job": self.job,
        }
        text = json.dumps(content, indent=2) + "\n"
        write_file(root / MANIFEST_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    def delete_listed(self, root: Path) -> None:
        """Delete what the manifest lists, then the manifest; foreign files and folders stay."""
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
        """Delete the partial files and temporary folders of a killed run."""
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
