"""Writes the folder ``model`` of a run, for all commands."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from grasp_lightning.errors import PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.side_files import copy_side_files
from grasp_lightning.models.source import ModelOrigin
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.models.streamed_saving import save_streamed, verify_streamed
from grasp_lightning.models.verification import verify_saved
from grasp_lightning.plan import Plan
from grasp_lightning.reading.text import read_text, told
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import PLAN
from grasp_lightning.storage.shards import KeptShards

VERIFY = "verify"
_CARD_NAME = "README.md"


def write_model(
    run: RunFolder,
    loaded: LoadedModel,
    card: str,
    *,
    generates: bool = True,
    phases: Phases | None = None,
    shards: KeptShards | None = None,
) -> None:
    """Write the folder ``model`` of a run, and verify it: in a fresh process unless streamed.

    Args:
        loaded: Model, tokenizer and the side files of their origin.
        card: Content of README.md.
        generates: Whether the model can generate with its cache.
        phases: Times the verification.
        shards: Keeps the weight files of a streamed model for a later start; None keeps none.
    """
    model, weights = loaded.model, streamed_weights(loaded.model)
    hashes: dict[str, str] = {}
    with run.new_folder("model") as folder:
        if weights is None:
            save_model(model, folder, tokenizer=loaded.tokenizer)
        else:
            hashes = save_streamed(
                model, weights.tensors, folder, tokenizer=loaded.tokenizer, write_file=shards
            )
        write_beside(folder, loaded.origin, card)
        with nullcontext() if phases is None else phases(VERIFY):
            if weights is None:
                verify_saved(model, folder, generates=generates)
            else:
                verify_streamed(folder, hashes)


def write_beside(
    folder: Path, origin: ModelOrigin, card: str, texts: Mapping[str, str] | None = None
) -> None:
    """Write the files beside a model's weights: card, other texts by name, and its side files."""
    for name, text in {**(texts or {}), _CARD_NAME: card}.items():
        (folder / name).write_text(text, encoding="utf-8")
    copy_side_files(origin.side_files, folder)


def read_card(folder: Path | None) -> str | None:
    """Return the model card in a model's folder; None if there is none."""
    file = None if folder is None else folder / _CARD_NAME
    if file is None or not file.is_file():
        return None
    return file.read_text(encoding="utf-8", errors="replace")


def read_plan(folder: Path | None) -> Plan | None:
    """Return the plan of the run whose folder holds a model's folder; None if there is none.

    Raises:
        PlanError: If it cannot be read.
    """
    file = None if folder is None else folder.resolve().parent / PLAN
    if file is None or not file.is_file():
        return None
    try:
        return Plan.from_json(read_text(file, PlanError))
    except PlanError as error:
        advice = "restore it, or move the model's folder away from it"
        raise PlanError(told(file, f"is damaged: {error}", advice)) from error
