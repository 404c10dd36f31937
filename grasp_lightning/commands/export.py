"""``export``: a compressed model in a format for programs without support for its layers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from rich.console import Console

from grasp_lightning.config import ExportConfig, ModelConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.errors import ConfigError, GraspError, ModelError, OutputError
from grasp_lightning.models.formats import FORMATS, ExportFacts, Format
from grasp_lightning.models.loading import load_meta_model, load_model
from grasp_lightning.models.model_settings import named_by
from grasp_lightning.models.streamed_loading import load_streamed
from grasp_lightning.models.verification import can_generate
from grasp_lightning.models.weight_files import weight_files
from grasp_lightning.progress import track
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type, to_plain
from grasp_lightning.reporting.card import base_model_of, export_card
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.model_folder import read_card, write_beside

FACTS_NAME = "export.json"
SOURCE_CARD_NAME = "COMPRESSED_MODEL_CARD.md"

_MODEL_NAME = "model"
_FINGERPRINT = "source_sha256"  # of config.json and the weight files of the compressed model
_SAFETY = 1.1  # tokenizer and cards, in addition to the weights


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """A finished export, with its folder as the user named it."""

    folder: Path
    facts: ExportFacts

    @property
    def lines(self) -> list[str]:
        """Text for the user: what was written, and where."""
        return self.facts.lines(self.folder / _MODEL_NAME)


def run_export(config: ExportConfig) -> ExportRun:
    """Write a copy of a compressed model in another format; a finished export is only read.

    Raises:
        GraspError: If model or output folder does not fit; no file of the export remains.
    """
    _refuse_other_keys(config)
    source = _source_folder(config.model)
    with RunFolder.open(
        config.output_dir, to_dict(config), overwrite=config.overwrite, protected=[source]
    ) as run:
        if run.state == "finished":
            facts = _stored_facts(run, source, FORMATS[config.format])
        else:
            try:
                facts = _execute(source, config, run)
            except GraspError:
                run.discard()
                raise
    return ExportRun(folder=Path(config.output_dir), facts=facts)


def _refuse_other_keys(config: ExportConfig) -> None:
    if config.loading == "streamed" and config.format != "dense":
        raise ConfigError(
            f"loading: format {config.format} needs the whole model: set loading=whole, or "
            "format=dense"
        )
    types = FORMATS[config.format].types
    if config.type is not None and config.type not in types:
        owner = next(name for name, format_ in FORMATS.items() if config.type in format_.types)
        expected = f"expected {' or '.join(types)}" if types else "leave it out"
        raise ConfigError(
            f"type: {config.format} has no type {config.type}: {expected}, or set format={owner}"
        )
    for name in FORMATS.keys() - {config.format}:
        for key in fields(config):
            if key.name.startswith(f"{name}_") and getattr(config, key.name) is not None:
                raise ConfigError(
                    f"{key.name}: has no effect with format {config.format}; leave it out, or set "
                    f"format={name}"
                )


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


def _stored_facts(run: RunFolder, source: Path, target: Format) -> ExportFacts:
    file = run.path(FACTS_NAME)
    try:
        content = read_json(file)
        fingerprint = content.pop(_FINGERPRINT, None)
        facts = as_type(target.facts, content, FACTS_NAME)
    except GraspError as error:
        raise OutputError(f"{file} is missing or damaged; export again with --overwrite") from error
    if fingerprint != _fingerprint(source):
        raise OutputError(
            f"{run.root} contains an export of an earlier version of {source}; use another "
            "output_dir or --overwrite"
        )
    return facts


def _execute(source: Path, config: ExportConfig, run: RunFolder) -> ExportFacts:
    # On the CPU: one product per linear is fast, and the dense model need not fit on a GPU.
    settings = ModelConfig(path=str(source), device="cpu", loading=config.loading)
    target, is_streamed = FORMATS[config.format], config.loading == "streamed"
    empty = load_meta_model(settings)
    refusal = target.refusal(empty, config)
    if refusal is not None:
        raise ModelError(f"model: {source} {refusal}")
    run.check_free_space(int(_SAFETY * target.num_bytes(empty, config)))
    if is_streamed:
        with named_by("model"):
            loaded, _ = load_streamed(settings, may_be_compressed=True)
    else:
        loaded = load_model(settings)
    generates = not is_streamed and can_generate(loaded.model)
    with run.new_folder(_MODEL_NAME) as folder:
        facts = target.write(loaded, folder, config, partial(_track, target.doing))
        source_card = read_card(source)
        card = export_card(
            config.format,
            to_plain(facts),
            library=target.library,
            base_model=base_model_of(source_card or "") or loaded.origin.name,
            licence=loaded.origin.licence,
            licence_files=[file.name for file in loaded.origin.licence_files],
            source_card=SOURCE_CARD_NAME if source_card else None,
        )
        texts = {SOURCE_CARD_NAME: source_card} if source_card else {}
        write_beside(folder, loaded.origin, card, texts)
        target.verify(loaded, folder, generates=generates)
    run.write_json(FACTS_NAME, {_FINGERPRINT: _fingerprint(source), **to_plain(facts)})
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
