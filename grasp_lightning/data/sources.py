"""Sources of text: the embedded corpus, the hub, or a local file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grasp_lightning.config import EvaluationConfig
from grasp_lightning.config.common import CorpusSource
from grasp_lightning.data.files import read_file
from grasp_lightning.data.hub import HUB_CORPORA, hub_documents
from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.pydoc import PYDOC_SPLITS, pydoc_documents
from grasp_lightning.data.rows import ALL_ROWS, RowRange
from grasp_lightning.errors import ConfigError, DataError

Part = Literal["calibration", "evaluation", "text"]
"""Purpose of the text, and name of the section of the configuration."""

SOURCES = ("pydoc", *HUB_CORPORA, "file")
DEFAULT_FIELD = "text"


@dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One source of calibration text, with the keys that apply to it.

    Attributes:
        num_samples: Number of its windows, at least 1.
        rows: Rows of its file, see ``RowRange.parse``; None for all.
        split: Part of the corpus; None for the default.
    """

    source: str
    num_samples: int
    path: str | None = None
    rows: str | None = None
    split: str | None = None
    field: str = DEFAULT_FIELD


Corpus = EvaluationConfig | MixturePart


_FILE = "file"
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Documents:
    """Unconnected texts, at least one of them not blank, and the corpus's name in messages."""

    texts: tuple[str, ...]
    name: str


def corpus_named(name: str, key: str) -> CorpusSource:
    """Return the source that a name or a path of a file stands for, given by a key.

    Raises:
        ConfigError: If it is neither.
    """
    if Path(name).suffix.lower() in _FILE_SUFFIXES:
        return CorpusSource(source=_FILE, path=name)
    names = [source for source in SOURCES if source != _FILE]
    if name not in names:
        raise ConfigError(
            f"{key}: expected {', '.join(names)}, or a file ({', '.join(_FILE_SUFFIXES)}), got "
            f"{name!r}"
        )
    return CorpusSource(source=name)


def source_licence(source: str) -> str | None:
    """Return the terms of use of a named corpus; None for local files and text of the model."""
    if source == "pydoc":
        return "PSF License Agreement, version 2"
    if source in HUB_INSTRUCTIONS:
        return HUB_INSTRUCTIONS[source].licence
    return HUB_CORPORA[source].licence if source in HUB_CORPORA else None


def check_corpus(corpus: Corpus, part: Part) -> str | None:
    """Check the keys of a section without reading text; return the split of a named corpus.

    Raises:
        ConfigError: If the source or the split is unknown, or a key has no effect.
    """
    if corpus.source not in SOURCES:
        raise ConfigError(
            f"{part}.source {corpus.source!r} is unknown; expected one of {', '.join(SOURCES)}"
        )
    if corpus.source == "file":
        return None
    _refuse_file_keys(corpus, part)
    return _split(corpus, part)


def read_documents(corpus: Corpus, part: Part) -> Documents:
    """Read the text that a section of the configuration names, in the order of the source.

    Args:
        part: The section; chooses the default split and names the keys in messages.

    Raises:
        DataError: If the corpus is unreadable or has no text; and as ``check_corpus``.
    """
    split = check_corpus(corpus, part)
    if split is None:
        return _file_documents(corpus, part)
    name = f"{corpus.source} ({split})"
    if corpus.source == "pydoc":
        texts = pydoc_documents("test" if split == "test" else "train")
    else:
        texts = hub_documents(corpus.source, split)
    if not any(text.strip() for text in texts):
        raise DataError(f"{name} has no text; choose another {part}.source")
    return Documents(texts, name)


def _file_documents(corpus: Corpus, part: Part) -> Documents:
    if not corpus.path:
        raise ConfigError(f"{part}.source file needs {part}.path: a .txt, .jsonl or .parquet file")
    if corpus.split is not None:
        raise ConfigError(
            f"{part}.split {corpus.split!r} has no effect with {part}.source file; remove it, and "
            f"set {part}.path to the file of that split"
        )
    path = Path(corpus.path).expanduser()
    rows = RowRange.parse(corpus.rows, f"{part}.rows")
    if path.suffix.lower() == ".txt":
        _refuse_field(corpus, part, "a .txt file has no columns")
        if rows != ALL_ROWS:
            raise ConfigError(
                f"{part}.rows {corpus.rows} has no effect: {path} is one document, without rows; "
                "remove it"
            )
    documents = read_file(path, corpus.field)
    if rows == ALL_ROWS:
        return Documents(documents, str(path))
    name = f"rows {rows} of {path}"
    documents = rows.cut(documents, str(path), f"{part}.rows")
    if not any(text.strip() for text in documents):
        raise DataError(f"{name} have no text; choose other {part}.rows")
    return Documents(documents, name)


def _refuse_file_keys(corpus: Corpus, part: Part) -> None:
    if corpus.path is not None:
        raise ConfigError(
            f"{part}.path {corpus.path!r} has no effect with {part}.source {corpus.source}; remove "
            f"it, or set {part}.source to file"
        )
    if corpus.rows is not None:
        raise ConfigError(
            f"{part}.rows {corpus.rows} has no effect with {part}.source {corpus.source}; remove "
            f"it, or set {part}.source to file"
        )
    _refuse_field(corpus, part, f"{part}.source is {corpus.source}")


def _refuse_field(corpus: Corpus, part: Part, reason: str) -> None:
    if corpus.field != DEFAULT_FIELD:
        raise ConfigError(f"{part}.field {corpus.field!r} has no effect: {reason}; remove it")


def _split(corpus: Corpus, part: Part) -> str:
    if corpus.source == "pydoc":
        splits: tuple[str, ...] = PYDOC_SPLITS
        default = "test" if part == "evaluation" else "train"
    else:
        hub = HUB_CORPORA[corpus.source]
        splits = hub.splits
        default = hub.evaluation_split if part == "evaluation" else hub.calibration_split
    split = default if corpus.split is None else corpus.split
    if split not in splits:
        raise ConfigError(
            f"{part}.split {split!r} is unknown; {corpus.source} has: {', '.join(splits)}"
        )
    return split
