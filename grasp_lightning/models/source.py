"""The source of a model: its folder, hub repository or file, and its licence."""

import hashlib
import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RevisionResolutionError

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ConfigError, DataError, ModelError
from grasp_lightning.models import gguf
from grasp_lightning.models.quiet_hub import quiet_hub
from grasp_lightning.models.side_files import WEIGHTS, is_licence, side_files
from grasp_lightning.models.weight_files import weight_files
from grasp_lightning.reading.text import user_path
from grasp_lightning.reading.yaml_text import parse_yaml

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)
_MAX_QUOTED = 300  # characters of a foreign error message
# Other copies of the weights, and subfolders.
_NOT_LOADED = [*(pattern for pattern in WEIGHTS if pattern != "*.safetensors")]
_NOT_LOADED += ["consolidated*", ".*", "*/*"]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelOrigin:
    """The source of a model, for reports and model cards.

    Attributes:
        name: Hub name, folder name, or GGUF file name with its quantization; never a path.
        licence: Licence identifier that the source states.
        side_files: Files that a derived model should keep; of a GGUF file, its licence alone.
        source_bytes: Size of the weight files on disk.
        quantized_source: Whether it is a GGUF file smaller than its float32 copy.
        folder: Local folder or .gguf file that output must never touch; None for a hub model.
    """

    name: str
    licence: str | None
    side_files: tuple[Path, ...]
    source_bytes: int | None
    quantized_source: bool
    folder: Path | None

    @property
    def licence_files(self) -> tuple[Path, ...]:
        """Licence and notice files among the side files."""
        return tuple(file for file in self.side_files if is_licence(file))


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A resolved ``ModelConfig.path``; ``name`` and ``folder`` are as in ``ModelOrigin``.

    Attributes:
        location: What transformers opens: a local folder, or a hub name.
        gguf_file: The local GGUF file, None for other formats.
        is_alias: Whether it is the model inside the quickstart's wheel.
        snapshot: Folder in the hub's cache, if it holds the whole model.
    """

    location: str
    name: str
    revision: str | None = None
    gguf_file: Path | None = None
    folder: Path | None = None
    is_alias: bool = False
    snapshot: Path | None = None

    @property
    def is_hub(self) -> bool:
        """Whether transformers fetches the files from the hub or its cache."""
        return self.gguf_file is None and self.folder is None

    def local_folder(self) -> Path | None:
        """Return the folder that holds the files; for a hub model its cached snapshot, if any."""
        if not self.is_hub or self.snapshot is not None:
            return self.snapshot or Path(self.location)
        try:
            cached = try_to_load_from_cache(self.location, "config.json", revision=self.revision)
        except HFValidationError:
            return None
        return Path(cached).parent if isinstance(cached, str) else None


def check_whole(config: ModelConfig) -> None:
    """Refuse a model that is to be streamed: a ``ConfigError``."""
    if config.loading == "streamed":
        raise ConfigError(
            "model.loading is streamed, which only compress, evaluate and export can do: set it to "
            "whole"
        )


def resolve_source(config: ModelConfig) -> ModelSource:
    """Return the source that a configuration names; local files exist, but are not read yet."""
    if not config.path.strip():
        raise ConfigError(
            "model.path is empty; expected a folder, a hub name, a .gguf file or smollm2"
        )
    if config.path == gguf.ALIAS:
        _refuse_keys(config, "the alias smollm2", "revision", "gguf_file")
        file = gguf.find_alias()
        return _gguf_source(file, folder=file.parent, is_alias=True)
    path = user_path(config.path, "model.path", ModelError)
    if path.is_file():
        return _file_source(config, path)
    if path.is_dir():
        return _folder_source(config, path)
    if _looks_like_path(config.path):
        raise ModelError(f"model.path: no such file or folder: {config.path}")
    return _hub_source(config)


def describe_origin(source: ModelSource) -> ModelOrigin:
    """Return the origin of a source; a hub model is described by its cached files only."""
    if source.gguf_file is not None:
        return _gguf_origin(source, source.gguf_file)
    folder = source.local_folder()
    files = weight_files(folder) if folder else []
    return ModelOrigin(
        name=source.name,
        licence=_card_licence(folder) if folder else None,
        side_files=side_files(folder) if folder else (),
        source_bytes=sum(file.stat().st_size for file in files) if files else None,
        quantized_source=False,
        folder=source.folder,
    )


def source_hash(config: ModelConfig) -> str:
    """Return a hash that identifies a model without loading it.

    It covers the bytes of a GGUF file, or of the config and the weight files of a local folder; for
    a hub model its name and commit.
    """
    source = pinned(resolve_source(config))
    if source.is_hub:
        return hashlib.sha256(f"{source.location}@{source.revision}".encode()).hexdigest()
    digest, folder = hashlib.sha256(), Path(source.location)
    files = [source.gguf_file] if source.gguf_file else [folder / "config.json"]
    files += [] if source.gguf_file else weight_files(folder)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(".gguf")


def _refuse_keys(config: ModelConfig, where: str, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) is not None:
            raise ConfigError(f"model.{key} has no effect with {where}; leave it out")


def _gguf_source(file: Path, *, folder: Path, is_alias: bool = False) -> ModelSource:
    # Absolute: transformers looks for a GGUF file in the working directory first.
    file = file.absolute()
    return ModelSource(
        location=str(file.parent),
        name=gguf.display_name(file),
        gguf_file=file,
        folder=folder,
        is_alias=is_alias,
    )


def _file_source(config: ModelConfig, path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelError(
            f"model.path: {config.path} is a file; expected a folder with config.json, a hub name, "
            f"a .gguf file or smollm2"
        )
    _refuse_keys(config, "a .gguf file as model.path", "revision", "gguf_file")
    return _gguf_source(path, folder=path.absolute())


def _folder_source(config: ModelConfig, path: Path) -> ModelSource:
    _refuse_keys(config, "a local folder", "revision")
    if config.gguf_file is not None:
        file = user_path(str(path / config.gguf_file), "model.gguf_file", ModelError)
        if not file.is_file():
            raise ModelError(f"model.gguf_file: {config.path} has no file {config.gguf_file}")
        return _gguf_source(file, folder=path)
    return ModelSource(location=str(path), name=path.resolve().name, folder=path)


def _hub_source(config: ModelConfig) -> ModelSource:
    if not _HUB_NAME.fullmatch(config.path):
        raise ModelError(
            f"model.path: {config.path!r} is neither a file, a folder nor a hub name like "
            f"HuggingFaceTB/SmolLM2-135M"
        )
    if config.gguf_file is None:
        return ModelSource(location=config.path, name=config.path, revision=config.revision)
    revision = _commit(config.path, config.revision)
    try:
        with quiet_hub():
            file = Path(hf_hub_download(config.path, config.gguf_file, revision=revision))
    except (OSError, HFValidationError) as error:
        raise hub_error(config.path, error) from error
    return ModelSource(
        location=str(file.parent),
        name=f"{config.path} ({file.name})",
        revision=config.revision,
        gguf_file=file,
    )


def pinned(source: ModelSource) -> ModelSource:
    """Pin a hub model to one commit, so that its files match; return other sources unchanged.

    A cached model is opened from its folder: transformers would ask the hub for each file that the
    model lacks, and without a network five times for each.
    """
    if not source.is_hub:
        return source
    source = replace(source, revision=_commit(source.location, source.revision))
    folder = source.local_folder()
    return replace(source, snapshot=folder) if folder and _is_whole(folder) else source


def _is_whole(folder: Path) -> bool:
    """Return whether a folder of the cache has all files of a model: a download may have ended."""
    try:
        return (folder / "tokenizer_config.json").exists() and bool(weight_files(folder))
    except ModelError:
        return False


def downloaded(source: ModelSource) -> ModelSource:
    """Pin a hub model whose safetensors files are read from a folder, and download what it lacks.

    Other sources are returned unchanged. Files that are neither in the cache nor on the hub raise a
    ``ModelError``.
    """
    source = pinned(source)
    is_there = not source.is_hub or source.snapshot is not None
    return source if is_there else replace(source, snapshot=_download(source))


def _download(source: ModelSource) -> Path:
    try:
        with quiet_hub():
            folder = huggingface_hub.snapshot_download(
                source.location, revision=source.revision, ignore_patterns=_NOT_LOADED
            )
    except (OSError, HFValidationError) as error:
        raise hub_error(source.location, error) from error
    if not weight_files(Path(folder)):
        raise hub_error(source.location, OSError("it has no safetensors files"))
    return Path(folder)


def _commit(name: str, revision: str | None) -> str:
    """Ask the hub once; later downloads report a wrong name themselves."""
    try:
        return huggingface_hub.resolve_revision(
            name, revision=revision, local_files_only=huggingface_hub.is_offline_mode()
        )
    except RevisionResolutionError as error:
        raise hub_error(name, error.__cause__ or error) from error
    except (HFValidationError, OSError) as error:
        raise hub_error(name, error) from error


def hub_error(name: str, error: BaseException) -> ModelError:
    """Return the error for a hub model that could not be fetched, from the error of the client."""
    return ModelError(
        f"model.path: cannot get {name} from the Hugging Face hub ({first_line(error)}); check "
        f"the name, model.revision, the network and HF_HUB_OFFLINE, or give a local folder"
    )


def first_line(error: BaseException) -> str:
    """Return an error's first line, or all lines if that ends with a colon, cut if it is long."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":"):
        text = " ".join(lines)
    return textwrap.shorten(text, _MAX_QUOTED, placeholder=" ...")


def _gguf_origin(source: ModelSource, file: Path) -> ModelOrigin:
    header = gguf.read_header(file)
    return ModelOrigin(
        name=source.name,
        licence=header.licence or _card_licence(file.parent),
        side_files=gguf.alias_licence_files()
        if source.is_alias
        else tuple(filter(is_licence, side_files(file.parent))),
        source_bytes=header.file_bytes,
        quantized_source=header.is_smaller_than_float32,
        folder=source.folder,
    )


def _card_licence(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    match = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        fields = parse_yaml(match[1], "", is_strict=False) if match else None
    except DataError:  # the model card of someone else, of which only the licence is needed
        return None
    if not isinstance(fields, dict):
        return None
    licence = fields.get("license")
    if licence == "other":  # on the hub, a licence with its own name
        licence = fields.get("license_name", licence)
    return licence if isinstance(licence, str) else None
