"""Instruction samples: read from the hub, or from a local .jsonl, .json or .parquet file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grasp_lightning.data.records import check_data_file, read_records, text_of
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
_OPTIONAL = ("input",)
_SUFFIXES = ".jsonl, .json or .parquet"


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
    check_data_file(path, (".jsonl", ".json", ".parquet"), f"a {_SUFFIXES} file")
    return _instructions(read_records(path, _REQUIRED, _OPTIONAL), str(path))


def _instructions(records: Iterable[tuple[str, object]], name: str) -> Instructions:
    samples = tuple(_sample(record, place) for place, record in records)
    if not samples:
        raise DataError(f"{name} is empty; expected samples with instruction, input and output")
    return Instructions(samples, name)


def _sample(record: object, place: str) -> InstructionSample:
    expected = f"the fields {', '.join((*_REQUIRED, *_OPTIONAL))}"
    instruction, output = (text_of(record, field, place, expected) for field in _REQUIRED)
    has_input = isinstance(record, Mapping) and record.get("input") is not None
    return InstructionSample(
        instruction=instruction,
        input=text_of(record, "input", place, expected) if has_input else "",
        output=output,
    )
