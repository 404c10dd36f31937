"""``export``: a compressed model in a format for programs without support for its layers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from rich.console import Console

from grasp_lightning.config import ExportConfig, ModelConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.errors import ConfigError, GraspError, ModelError
from grasp_lightning.models.formats import FORMATS, ExportFacts
from grasp_lightning.models.loading import load_meta_model, load_model
from grasp_lightning.models.model_settings import named_by
from grasp_lightning.models.streamed_loading import load_streamed
from grasp_lightning.models.verification import can_generate
from grasp_lightning.models.weight_files import weight_files
from grasp_lightning.progress import track
from grasp_lightning.reading.typed import to_plain
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.copies import (
    MODEL_NAME,
    SIZE_FACTOR,
    CopyRun,
    finish_copy,
    stored_facts,
    write_beside_copy,
)

FACTS_NAME = "export.json"
SOURCE_CARD_NAME = "COMPRESSED_MODEL_CARD.md"


def run_export(config: ExportConfig) -> CopyRun[ExportFacts]:
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
            facts = stored_facts(
                run,
                FACTS_NAME,
                FORMATS[config.format].facts,
                _fingerprint(source),
                source=str(source),
                verb="export",
            )
        else:
            try:
                facts = _execute(source, config, run)
            except GraspError:
                run.discard()
                raise
    return CopyRun(folder=Path(config.output_dir), facts=facts)


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
        inner = folder / MODEL_NAME
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise ModelError(f"model: {model} has no config.json; {expected}{hint}")
    return folder


def _execute(source: Path, config: ExportConfig, run: RunFolder) -> ExportFacts:
    # On the CPU: one product per linear is fast, and the dense model need not fit on a GPU.
    settings = ModelConfig(path=str(source), device="cpu", loading=config.loading)
    target, is_streamed = FORMATS[config.format], config.loading == "streamed"
    empty = load_meta_model(settings)
    refusal = target.refusal(empty, config)
    if refusal is not None:
        raise ModelError(f"model: {source} {refusal}")
    run.check_free_space(int(SIZE_FACTOR * target.num_bytes(empty, config)))
    if is_streamed:
        with named_by("model"):
            loaded, _ = load_streamed(settings, may_be_compressed=True)
    else:
        loaded = load_model(settings)
    generates = not is_streamed and can_generate(loaded.model)
    with run.new_folder(MODEL_NAME) as folder:
        facts = target.write(loaded, folder, config, partial(_track, target.doing))
        write_beside_copy(
            folder,
            loaded.origin,
            config.format,
            {"facts": to_plain(facts)},
            source_card=SOURCE_CARD_NAME,
            library=target.library,
        )
        target.verify(loaded, folder, generates=generates)
    finish_copy(run, FACTS_NAME, facts, _fingerprint(source))
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
