"""Weight files of a model that is being saved, which a killed run need not write again."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.models.streamed_saving import file_hashes
from grasp_lightning.reading.text import read_json
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.files import link
from grasp_lightning.run_folder.names import CHECKPOINTS

SHARDS: Final = f"{CHECKPOINTS}/model*"


class KeptShards:
    """Writes each weight file into the checkpoints of a run first, and links to it from its place.

    Args:
        run: The run.
        key: Identifies the model within the run.
    """

    def __init__(self, run: RunFolder, key: str) -> None:
        self._run = run
        self._key = key

    def __call__(self, path: Path, write: Callable[[Path], dict[str, str]]) -> dict[str, str]:
        """Write a weight file, unless an earlier start has written it, and return its hashes.

        Args:
            path: Its place.
            write: Writes to the given path, and returns the sha256 of each tensor by name.
        """
        name = f"{CHECKPOINTS}/{path.name}"
        hashes = self._finished(name)
        if not hashes:
            self._run.write_with(name, lambda target: hashes.update(write(target)))
            self._run.write_json(f"{name}.json", {"key": self._key, "hashes": hashes})
        link(self._run.path(name), path)
        return hashes

    def _finished(self, name: str) -> dict[str, str]:
        """Return the hashes of a file that is complete and undamaged; none of any other file."""
        file, notes = self._run.path(name), self._run.path(f"{name}.json")
        if not (file.is_file() and notes.is_file()):
            return {}
        try:
            content = read_json(notes, PlanError)
            found = file_hashes(file, ModelError)
        except (PlanError, ModelError):
            return {}
        return found if content == {"key": self._key, "hashes": found} else {}
