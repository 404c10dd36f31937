"""What was measured on the model of one cell, in a file that grows with every measurement."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Self, TypeVar

from grasp_lightning.errors import OutputError
from grasp_lightning.evaluation.cost import ModelCost
from grasp_lightning.evaluation.results import CorpusResult
from grasp_lightning.evaluation.task_results import TaskRun
from grasp_lightning.evaluation.throughput import Spread
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type, to_plain
from grasp_lightning.run_folder import write_file

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Keyed(Generic[T]):
    """A measurement, and the key of the model and the settings that it was made with."""

    key: str
    result: T


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Throughput of one kind.

    Attributes:
        tokens_per_second: Of the prompt, or decoded over all sequences.
        ratio: Tokens per second, divided by the dense model's in the same round.
    """

    tokens_per_second: Spread
    ratio: Spread


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything measured so far on one cell.

    Attributes:
        made: Key of the model's configuration when it was made; None for the dense model.
        machine: Hardware and versions, on one line.
        cost: Parameters and bytes.
        texts: Perplexity by text.
        tasks: Runs of tasks by requested name.
        speed: Throughput by kind, ``prefill`` and ``decode``.
        seconds: Wall-clock seconds of all processes so far, by what they did.
    """

    made: str | None = None
    machine: str | None = None
    cost: Keyed[ModelCost] | None = None
    texts: Mapping[str, Keyed[CorpusResult]] = field(default_factory=dict)
    tasks: Mapping[str, Keyed[TaskRun]] = field(default_factory=dict)
    speed: Keyed[Mapping[str, Speed]] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the content of a file, nothing if it is absent; an ``OutputError`` if damaged."""
        if not file.exists():
            return cls()
        advice = "delete it, and everything in it is measured again"
        content = read_json(file, OutputError, str(file), advice)
        return as_type(cls, content, f"{file} is damaged", OutputError, advice)

    def write(self, file: Path) -> None:
        """Replace a file."""
        text = json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n"
        write_file(file, lambda path: path.write_text(text, encoding="utf-8"))

    def with_seconds(self, what: str, seconds: float) -> Self:
        """Return the measurements with more time spent."""
        total = self.seconds.get(what, 0.0) + seconds
        return replace(self, seconds={**self.seconds, what: total})


def key_of(*settings: object) -> str:
    """Return a key that changes with any of the plain values or dataclasses."""
    text = json.dumps(to_plain(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
