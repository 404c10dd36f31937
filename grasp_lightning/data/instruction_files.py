"""Instruction samples: read from the hub, or from a local .jsonl, .json or .parquet file."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lightning.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class InstructionSample:
    """One task and its answer.

    Attributes:
        instruction: What is asked.
        input: What the instruction is about; empty where it needs nothing more.
        output: The answer.
    """

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Instructions:
    """Samples of one source.

    Attributes:
        samples: The samples, in the order of the source.
        name: What messages call the source.
    """

    samples: tuple[InstructionSample, ...]
    name: str

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)


@dataclass(frozen=True, kw_only=True)
class HubInstructions:
    """Where instruction samples lie on the hub.

    Attributes:
        repository: Name of the data set, with the columns of ``InstructionSample``.
        revision: Commit.
        split: Part of the data set.
        licence: Conditions of use, as the publishers of Stanford Alpaca state them.
    """

    repository: str
    revision: str
    split: str
    licence: str


HUB_INSTRUCTIONS: dict[str, HubInstructions] = {
    # 51,760 samples: Stanford Alpaca without its wrong and empty answers.
    "alpaca": HubInstructions(
        repository="yahma/alpaca-cleaned",
        revision="12567cabf869d7c92e573c7c783905fc160e9639",
        split="train",
        licence="CC BY-NC 4.0",
    ),
}
INSTRUCTION_SOURCES = (*HUB_INSTRUCTIONS, "file")

_REQUIRED = ("instruction", "output")
_FIELDS = (*_REQUIRED, "input")


def read_instructions(
    source: str, path: str | None, section: str, file_source: str = "file"
) -> Instructions:
    """Read the samples that a section of the configuration asks for.

    A sample without ``input``, or with null there, has none; other fields than those of
    ``InstructionSample`` are ignored. A source that cannot be read, has no sample, or has one
    without instruction or output, is a ``DataError`` that names file and line.

    Args:
        source: Name of a hub data set, or ``file``.
        path: A .jsonl file (an object per line), .json file (a list of objects) or .parquet file
            for ``source: file``.
        section: Section of the configuration that holds these keys, for messages.
        file_source: What the section calls a local file.

    Returns:
        At least one sample.

    Raises:
        ConfigError: If the source is unknown, or ``path`` is missing or without effect.
    """
    if source not in INSTRUCTION_SOURCES:
        raise ConfigError(
            f"{section}.source {source!r} is unknown; expected one of "
            f"{', '.join(INSTRUCTION_SOURCES)}"
        )
    if source != "file":
        if path is not None:
            raise ConfigError(
                f"{section}.path {path!r} has no effect with {section}.source {source}; remove it, "
                f"or set {section}.source to file"
            )
        return _from_hub(source, section, file_source)
    if not path:
        raise ConfigError(f"{section}.source file needs {section}.path: a {_SUFFIXES} file")
    return _from_file(Path(path).expanduser())


def _from_hub(source: str, section: str, file_source: str) -> Instructions:
    import datasets  # noqa: PLC0415  # slow to import, so loaded on use

    hub = HUB_INSTRUCTIONS[source]
    name = f"{source} ({hub.repository})"
    try:
        rows = datasets.load_dataset(hub.repository, split=hub.split, revision=hub.revision)
    # ValueError: what the library raises offline for a data set that is not in its cache.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub: {reason}; without internet, use "
            f"{section}.source: {file_source} with {section}.path: a {_SUFFIXES} file"
        ) from error
    records = ((f"{name}, row {number}", record) for number, record in enumerate(rows))
    return _instructions(records, name)


def _from_file(path: Path) -> Instructions:
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a {_SUFFIXES} file")
    if reader is None:
        raise DataError(f"{path} has the suffix {path.suffix!r}; expected a {_SUFFIXES} file")
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a {_SUFFIXES} file")
    try:
        return _instructions(reader(path), str(path))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _instructions(records: Iterable[tuple[str, object]], name: str) -> Instructions:
    samples = tuple(_sample(record, place) for place, record in records)
    if not samples:
        raise DataError(f"{name} is empty; expected samples with instruction, input and output")
    return Instructions(samples, name)


def _sample(record: object, place: str) -> InstructionSample:
    if not isinstance(record, dict):
        raise DataError(
            f"{place} is no JSON object; expected one with the fields {', '.join(_FIELDS)}"
        )
    missing = [field for field in _REQUIRED if field not in record]
    if missing:
        names = ", ".join(record) or "nothing"
        raise DataError(f"{place} has no field {missing[0]!r}; it has: {names}")
    instruction, output = (_text(record[field], field, place) for field in _REQUIRED)
    given = record.get("input")
    return InstructionSample(
        instruction=instruction,
        input="" if given is None else _text(given, "input", place),
        output=output,
    )


def _text(value: object, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r} is {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} holds half of a surrogate pair, which is no text"
        ) from error
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    # utf-8-sig: the byte-order mark that some editors write is no part of the text.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _parsed(line, place, "one object per line")


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    expected = "a list of objects; one object per line belongs in a .jsonl file"
    records = _parsed(text, str(path), expected)
    if not isinstance(records, list):
        raise DataError(f"{path} holds no JSON list; expected {expected}")
    for number, record in enumerate(records, start=1):
        yield f"{path}, item {number}", record


def _parsed(text: str, place: str, expected: str) -> object:
    try:
        parsed: object = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        reason = getattr(error, "msg", error)
        if isinstance(error, json.JSONDecodeError) and "\n" in text.strip():
            reason = f"{reason} in line {error.lineno}"
        raise DataError(f"{place} is not JSON ({reason}); expected {expected}") from error
    return parsed


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    # Heavy, so loaded on use.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        names: list[str] = pq.read_schema(path).names
        missing = [field for field in _REQUIRED if field not in names]
        if missing:
            has = ", ".join(names) or "nothing"
            raise DataError(f"{path} has no column {missing[0]!r}; it has: {has}")
        table = pq.read_table(path, columns=[field for field in _FIELDS if field in names])
        rows: list[dict[str, Any]] = table.to_pylist()  # Any: a column of any type
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
_SUFFIXES = ".jsonl, .json or .parquet"
