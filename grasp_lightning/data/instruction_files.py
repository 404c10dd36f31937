"""Instruction samples: read from the hub, or from a local .jsonl, .json or .parquet file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grasp_lightning.data.hub import load_from_hub
from grasp_lightning.data.records import check_data_file, read_records, text_of
from grasp_lightning.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class InstructionSample:
    """One task and its answer.

    Attributes:
        input: What the instruction is about; may be empty.
    """

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Instructions:
    """Samples of one source, in order, and the source's name in messages."""

    samples: tuple[InstructionSample, ...]
    name: str

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, kw_only=True)
class HubInstructions:
    """Instruction samples on the hub, in the columns of ``InstructionSample``."""

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
    """Read the samples that a section of the configuration names; there is at least one.

    A sample may lack ``input``, or have null there; fields that ``InstructionSample`` lacks are
    ignored. An unreadable or empty source, or a sample without instruction or output, is a
    ``DataError`` that names file and line.

    Args:
        source: Name of a hub data set, or ``file``.
        path: For ``source: file``: a .jsonl file (one object per line), a .json file (a list of
            objects) or a .parquet file.
        section: Section of the configuration, for messages.
        file_source: The section's name for a local file, for messages.

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
        hub = HUB_INSTRUCTIONS[source]
        name = f"{source} ({hub.repository})"
        advice = f"{section}.source: {file_source} with {section}.path: a {_SUFFIXES} file"
        rows = load_from_hub(hub.repository, name, advice, split=hub.split, revision=hub.revision)
        return _instructions(
            ((f"{name}, row {number}", record) for number, record in enumerate(rows)), name
        )
    if not path:
        raise ConfigError(f"{section}.source file needs {section}.path: a {_SUFFIXES} file")
    file = Path(path).expanduser()
    check_data_file(file, (".jsonl", ".json", ".parquet"), f"a {_SUFFIXES} file")
    return _instructions(read_records(file, _REQUIRED, _OPTIONAL), str(file))


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
