"""``export``: a compressed model in a format for runtimes without support for its layers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from grasp_lightning.config import ExportConfig, ModelConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.errors import GraspError, ModelError, OutputError
from grasp_lightning.models.formats import FORMATS, Format
from grasp_lightning.models.loading import load_meta_model, load_model
from grasp_lightning.models.lowrank import ranks_of, shapes_of
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.verification import can_generate
from grasp_lightning.models.weight_files import weight_files
from grasp_lightning.progress import track
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type, to_plain
from grasp_lightning.reporting.card import base_model_of, export_card
from grasp_lightning.reporting.metrics import Pair
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.model_folder import read_card, write_model

FACTS_NAME = "export.json"
SOURCE_CARD_NAME = "COMPRESSED_MODEL_CARD.md"

_MODEL_NAME = "model"
_SAFETY = 1.1  # tokenizer and cards, in addition to the weights


@dataclass(frozen=True, kw_only=True)
class ExportFacts:
    """What was exported: the content of ``export.json``.

    Attributes:
        source_sha256: Fingerprint of the compressed model's config.json and weight files.
        ranks: Rank of each linear whose factors were multiplied, by full name.
        parameters: Of the copy (dense) and of the compressed model.
        shapes: [out_features, in_features] of each narrowed linear padded with zeros, by full name.
    """

    source_sha256: str
    ranks: dict[str, int]
    parameters: Pair[int]
    dtype: str
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """A finished export, with its folder as the user named it."""

    folder: Path
    facts: ExportFacts

    @property
    def lines(self) -> list[str]:
        """Text for the user: the path of the copy, and that it is not smaller."""
        ranks, shapes, parameters = self.facts.ranks, self.facts.shapes, self.facts.parameters
        done = [f"factors of {len(ranks)} linears multiplied"] if ranks or not shapes else []
        done += [f"{len(shapes)} narrowed linears padded with zeros"] if shapes else []
        first = (
            f"{', '.join(done)}: {parameters.dense:,} parameters, the compressed model has "
            f"{parameters.compressed:,}; this copy is not smaller"
        )
        return [first, f"model:  {self.folder / _MODEL_NAME}"]


def run_export(config: ExportConfig) -> ExportRun:
    """Write a copy of a compressed model as an ordinary checkpoint; a finished export is only read.

    Raises:
        GraspError: If model or output folder does not fit; no file of the export remains.
    """
    source = _source_folder(config.model)
    with RunFolder.open(
        config.output_dir, to_dict(config), overwrite=config.overwrite, protected=[source]
    ) as run:
        if run.state == "finished":
            facts = _stored_facts(run, source)
        else:
            try:
                facts = _execute(source, FORMATS[config.format], run)
            except GraspError:
                run.discard()
                raise
    return ExportRun(folder=Path(config.output_dir), facts=facts)


def _source_folder(model: str) -> Path:
    folder = Path(model).expanduser()
    expected = "expected the model/ folder of a compressed model"
    if not folder.is_dir():
        came = "is a file" if folder.is_file() else "the folder does not exist"
        raise ModelError(f"model: {model}: {came}; {expected}")
    if not (folder / "config.json").is_file():
        inner = folder / _MODEL_NAME
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise ModelError(f"model: {model} has no config.json; {expected}{hint}")
    return folder


def _stored_facts(run: RunFolder, source: Path) -> ExportFacts:
    file = run.path(FACTS_NAME)
    try:
        facts = as_type(ExportFacts, read_json(file), FACTS_NAME)
    except GraspError as error:
        raise OutputError(f"{file} is missing or damaged; export again with --overwrite") from error
    if facts.source_sha256 != _fingerprint(source):
        raise OutputError(
            f"{run.root} contains an export of an earlier version of {source}; use another "
            "output_dir or --overwrite"
        )
    return facts


def _execute(source: Path, target: Format, run: RunFolder) -> ExportFacts:
    # On the CPU: one product per linear is fast, and the dense model need not fit on a GPU.
    settings = ModelConfig(path=str(source), device="cpu")
    empty = load_meta_model(settings)
    refusal = target.refusal(empty)
    if refusal is not None:
        raise ModelError(f"model: {source} {refusal}")
    target.convert(empty, tuple)
    size = sum(parameter.numel() * parameter.element_size() for parameter in empty.parameters())
    run.check_free_space(int(_SAFETY * size))
    loaded = load_model(settings)
    model = loaded.model
    generates = can_generate(model)
    ranks, shapes, compressed = ranks_of(model), shapes_of(model), count_parameters(model)
    target.convert(model, partial(_track, target.doing))
    facts = ExportFacts(
        source_sha256=_fingerprint(source),
        ranks=ranks,
        parameters=Pair(dense=count_parameters(model), compressed=compressed),
        dtype=str(model.dtype).removeprefix("torch."),
        shapes=shapes,
    )
    origin, source_card = loaded.origin, read_card(source)
    card = export_card(
        base_model=base_model_of(source_card or "") or origin.name,
        num_linears=len(facts.ranks),
        num_narrowed=len(facts.shapes),
        parameters=facts.parameters,
        dtype=facts.dtype,
        licence=origin.licence,
        licence_files=[file.name for file in origin.licence_files],
        source_card=SOURCE_CARD_NAME if source_card else None,
    )
    texts = {SOURCE_CARD_NAME: source_card} if source_card else {}
    write_model(run, loaded, card, texts, save=target.save, generates=generates)
    run.write_json(FACTS_NAME, to_plain(facts))
    run.finish()
    return facts


def _fingerprint(source: Path) -> str:
    """Return a sha256 over config.json and the weight files, ordered by name."""
    digest = hashlib.sha256()
    for file in (source / "config.json", *weight_files(source)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _track(description: str, linears: Sequence[str]) -> Iterable[str]:
    # On standard error: standard output is for the result.
    return track(linears, description, console=Console(stderr=True))
