"""What ``export`` and ``trim`` write: a copy of a model in a run folder, and facts about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from grasp_lightning.errors import GraspError, OutputError
from grasp_lightning.models.source import ModelOrigin
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type, to_plain
from grasp_lightning.reporting.card import base_model_of, copy_card
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.model_folder import read_card, write_beside

MODEL_NAME: Final = "model"
SIZE_FACTOR: Final = 1.1  # tokenizer and cards, in addition to the weights

_FINGERPRINT: Final = "source_sha256"  # of the model that was copied

Facts = TypeVar("Facts")


@dataclass(frozen=True, kw_only=True)
class CopyRun(Generic[Facts]):
    """A finished export or trim, with its folder as the user named it."""

    folder: Path
    facts: Facts

    @property
    def model_folder(self) -> Path:
        """Folder of the copy."""
        return self.folder / MODEL_NAME


def write_beside_copy(
    folder: Path,
    origin: ModelOrigin,
    form: str,
    content: Mapping[str, object],
    *,
    source_card: str,
    library: str = "transformers",
) -> None:
    """Write the files beside the weights of a copy: two cards, and the side files of its source.

    Args:
        form: Form of the copy, and of its card.
        content: Values that this card needs.
        source_card: Name of the file for the card of the source, if it has one.
        library: Library that opens the copy.
    """
    text = read_card(origin.folder)
    card = copy_card(
        form,
        content,
        library=library,
        base_model=base_model_of(text or "") or origin.name,
        licence=origin.licence,
        licence_files=[file.name for file in origin.licence_files],
        source_card=source_card if text else None,
    )
    write_beside(folder, origin, card, {source_card: text} if text else {})


def finish_copy(run: RunFolder, name: str, facts: object, fingerprint: str) -> None:
    """Write the facts, with the fingerprint of the source, and finish the run."""
    run.write_json(name, {_FINGERPRINT: fingerprint, **to_plain(facts)})
    run.finish()


def stored_facts(
    run: RunFolder, name: str, kind: type[Facts], fingerprint: str, *, source: str, verb: str
) -> Facts:
    """Read the facts of a finished run.

    Args:
        name: Name of their file.
        fingerprint: That of the source now.
        source: What the user called it.
        verb: The command.

    Raises:
        OutputError: If they cannot be read, or the source has changed.
    """
    file = run.path(name)
    try:
        content = read_json(file)
        before = content.pop(_FINGERPRINT, None)
        facts = as_type(kind, content, name)
    except GraspError as error:
        raise OutputError(f"{file} is missing or damaged; {verb} again with --overwrite") from error
    if before != fingerprint:
        raise OutputError(
            f"{run.root} contains the {verb} of an earlier version of {source}; use another "
            "output_dir or --overwrite"
        )
    return facts
