"""The batches of every optimizer step of a training run, starting at any step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch

from grasp_lightning import processes
from grasp_lightning.config import BatchOrder, TrainingConfig
from grasp_lightning.data.batching import (
    Extras,
    MicroBatch,
    Rows,
    TokenSamples,
    collate,
    epoch_batches,
)

T_co = TypeVar("T_co", covariant=True)


class StepBatch(NamedTuple):
    """The batches of one optimizer step.

    Attributes:
        parts: The rows of this process as micro-batches. Every process has the same number of them;
            surplus ones have no targets.
        num_targets: Predicted tokens of the whole step, over all processes.
    """

    parts: list[MicroBatch]
    num_targets: int


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How samples are grouped into optimizer steps; see ``epoch_batches``.

    Attributes:
        batch_size: Rows per step.
        micro_batch_size: Rows per forward pass.
        max_steps: Maximum number of steps; None means no limit beyond ``epochs``.
    """

    batch_size: int
    micro_batch_size: int
    order: BatchOrder
    row_length: int
    epochs: int
    max_steps: int | None
    seed: int

    @classmethod
    def of(
        cls, config: TrainingConfig, *, order: BatchOrder, row_length: int, seed: int
    ) -> "StepOptions":
        """Return the options that section ``training`` sets."""
        return cls(
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            order=order,
            row_length=row_length,
            epochs=config.epochs,
            max_steps=config.max_steps,
            seed=seed,
        )


class ResumableSteps(ABC, Generic[T_co]):
    """Iterates over the optimizer steps of all epochs, as one sequence.

    Lightning can use it as a loader: it has a length, and checkpoints save its position
    (``state_dict``), so a resumed training run sees exactly the remaining steps.
    """

    def __init__(self) -> None:
        self._position = 0

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of all steps."""

    @abstractmethod
    def step(self, number: int) -> T_co:
        """Return what one step trains on."""

    def __iter__(self) -> Iterator[T_co]:
        while self._position < len(self):
            number = self._position
            self._position += 1  # before the step, so that a state saved after it includes it
            yield self.step(number)
        self._position = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps yielded so far."""
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume after the steps yielded before."""
        self._position = state_dict["position"]


class WindowSteps(ResumableSteps[list[int]]):
    """The windows of every optimizer step, shuffled again in each epoch; equal in all processes.

    Args:
        windows: Numbers of the windows to train on.
        size: Windows per step; the last step of an epoch may have fewer.
        epochs: Passes over the windows.
    """

    def __init__(self, windows: Sequence[int], *, size: int, epochs: int, seed: int) -> None:
        super().__init__()
        self._windows = windows
        self._size = size
        self._epochs = epochs
        self._seed = seed
        self.steps_per_epoch = -(-len(windows) // size)

    def __len__(self) -> int:
        return self._epochs * self.steps_per_epoch

    def step(self, number: int) -> list[int]:
        """Return the numbers of the windows of a step."""
        epoch, index = divmod(number, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self._windows), generator=generator).tolist()
        return [self._windows[i] for i in order[index * self._size : (index + 1) * self._size]]


class TrainingSteps(ResumableSteps[StepBatch]):
    """The optimizer steps of a compensation; equal samples and options give equal steps.

    Processes share the rows of a step. ``extras`` are added to the micro-batches.
    """

    def __init__(
        self, samples: TokenSamples, options: StepOptions, extras: Extras | None = None
    ) -> None:
        super().__init__()
        self._samples = samples
        self._options = options
        self._extras = extras
        self._epoch = lru_cache(maxsize=1)(self._batches_of)
        self.steps_per_epoch = len(self._epoch(0))

    def __len__(self) -> int:
        most = self._options.epochs * self.steps_per_epoch
        limit = self._options.max_steps
        return most if limit is None else min(most, limit)

    def step(self, number: int) -> StepBatch:
        """Return the rows of a step in micro-batches."""
        rows = self.rows(number)
        batches = processes.own_batches(rows, self._options.micro_batch_size)
        parts = [
            collate(self._samples, list(own), counts=counts, extras=self._extras)
            for own, counts in batches
        ]
        targets = self._samples.num_targets_of
        return StepBatch(parts, sum(int(targets[index]) for row in rows for index in row))

    def num_tokens(self, step: int) -> int:
        """Return the number of tokens in all rows of a step, without padding."""
        lengths = self._samples.lengths
        return sum(int(lengths[index]) for row in self.rows(step) for index in row)

    def rows(self, step: int) -> Rows:
        """Return the indices of the samples in each row of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def _batches_of(self, epoch: int) -> list[Rows]:
        return epoch_batches(
            self._samples,
            self._options.batch_size,
            order=self._options.order,
            row_length=self._options.row_length,
            seed=self._options.seed,
            epoch=epoch,
        )
