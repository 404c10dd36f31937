"""Everything that ``compare`` measured, convertible to plain values and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from grasp_lightning.evaluation.task_results import TaskResult
from grasp_lightning.evaluation.throughput import Spread
from grasp_lightning.reading.typed import as_type, to_plain

DENSE = "dense"
"""The method of the cell that holds the model before compression."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One cell of the grid: what was asked for, and what was measured.

    Attributes:
        model: The model's name in the configuration.
        method: The method's name in the configuration, or ``dense``.
        removed_ratio: Requested share of all parameters, in (0, 1); None for the dense model and
            for methods that set their own size.
        seed: Of the calibration windows and of the method.
        compensation: Name of the training after compression; None without.
        folder: Run folder, relative to the output folder of the grid.
        error: Why the cell failed, on one line; then nothing below is set.
        removed: Removed share of all parameters, in [0, 1].
        zeros: Share of all parameters that are set to zero but stored, in [0, 1].
        perplexity: By text.
        tasks: By task, with values per document for paired differences.
        validation_loss: After training, in nats per predicted token; None without training.
        bytes: Size of all parameters, at one dtype for all cells of a model.
        prefill: Tokens per second, divided by the dense model's in the same round.
        decode: The same for decoding.
        seconds: To compress and to train. Statistics that cells share count in each cell as if
            measured there.
        peak_memory_bytes: Of the compression and the training, counted in the same way.
        trained_tokens: Predicted tokens over all steps of the training; None without one.
        tokens_per_second: Predicted tokens per second of the median training step.
        trainable_parameters: Number of trained parameters; merged adapters count, too.
        paper: The paper's own numbers by column: a text, a task, or ``mean``.
    """

    model: str
    method: str
    removed_ratio: float | None
    seed: int
    compensation: str | None
    folder: str
    error: str | None = None
    removed: float | None = None
    zeros: float | None = None
    perplexity: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    validation_loss: float | None = None
    bytes: int | None = None
    prefill: Spread | None = None
    decode: Spread | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None
    trainable_parameters: int | None = None
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """True for the model before compression."""
        return self.method == DENSE

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return plain values with the attributes as keys."""
        content: dict[str, Any] = to_plain(self)
        return content

    @classmethod
    def from_dict(cls, content: object, what: str) -> Self:
        """Return a cell from the values of ``to_dict``; a ``DataError`` names ``what`` and key."""
        return as_type(cls, content, what)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of one grid.

    Attributes:
        cells: For each model the dense cell first, then the others in the order of the grid.
        machine: What it ran on, on one line.
        seconds: Wall-clock time of all cells together, also of those that an earlier start ran.
    """

    cells: tuple[CellResult, ...]
    machine: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return the content of ``comparison.json``."""
        content: dict[str, Any] = to_plain(self)
        return content

    @classmethod
    def from_dict(cls, content: object, what: str) -> Self:
        """Return a grid from the values of ``to_dict``; a ``DataError`` names ``what`` and key."""
        return as_type(cls, content, what)
