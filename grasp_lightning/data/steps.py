"""The batches of every optimizer step of a training, from any step on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from grasp_lightning import processes
from grasp_lightning.config import BatchOrder, TrainingConfig
from grasp_lightning.data.batching import MicroBatch, Rows, TokenSamples, collate, epoch_batches


class StepBatch(NamedTuple):
    """What one optimizer step learns from.

    Attributes:
        parts: The rows of this process, in parts that fit into memory; as many in every process,
            so that from some nothing is learned where the rows are not enough.
        num_targets: Predicted tokens of the whole step, over all processes.
    """

    parts: list[MicroBatch]
    num_targets: int


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How samples are dealt out to optimizer steps.

    Attributes:
        batch_size: Rows per step.
        micro_batch_size: Rows per forward pass.
        order: How samples meet.
        row_length: Most tokens of a row.
        epochs: How often each sample is seen.
        max_steps: Most steps; None leaves it to ``epochs``.
        seed: Seed of the order.
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
        """Return the options that a section of the configuration gives.

        Args:
            config: Section ``training``.
            order: How samples meet.
            row_length: Most tokens of a row.
            seed: Seed of the order.

        Returns:
            The options.
        """
        return cls(
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            order=order,
            row_length=row_length,
            epochs=config.epochs,
            max_steps=config.max_steps,
            seed=seed,
        )


class TrainingSteps:
    """Iterates over the optimizer steps of all epochs, as one sequence.

    Equal samples and options give equal steps, so that a training that was stopped goes on with the
    very samples that are left. Several processes share the rows of a step. A loader in the sense of
    Lightning: it has a length, and its position is saved with a checkpoint (``state_dict``).

    Args:
        samples: What is learned.
        options: How it is dealt out.
    """

    def __init__(self, samples: TokenSamples, options: StepOptions) -> None:
        self._samples = samples
        self._options = options
        self._position = 0
        self._epoch = lru_cache(maxsize=1)(self._batches_of)
        self.steps_per_epoch = len(self._epoch(0))

    def __len__(self) -> int:
        """Return the number of steps."""
        most = self._options.epochs * self.steps_per_epoch
        limit = self._options.max_steps
        return most if limit is None else min(most, limit)

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps that are left."""
        while self._position < len(self):
            rows = self.rows(self._position)
            self._position += 1  # before the step: a state that is saved after it counts it
            yield StepBatch(self._parts(rows), self._num_targets(rows))
        self._position = 0

    def _parts(self, rows: Rows) -> list[MicroBatch]:
        batches = processes.own_batches(rows, self._options.micro_batch_size)
        return [collate(self._samples, list(own), counts=counts) for own, counts in batches]

    def _num_targets(self, rows: Rows) -> int:
        return sum(int(self._samples.num_targets_of[index]) for row in rows for index in row)

    def rows(self, step: int) -> Rows:
        """Return which samples a step learns from.

        Args:
            step: Number of the step, from 0.

        Returns:
            Indices of the samples in each row.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps that were given out."""
        return {"position": self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the steps that were given out.

        Args:
            state_dict: What ``state_dict`` gave.
        """
        self._position = state_dict["position"]

    def _batches_of(self, epoch: int) -> list[Rows]:
        return epoch_batches(
            self._samples,
            self._options.batch_size,
            order=self._options.order,
            row_length=self._options.row_length,
            seed=self._options.seed,
            epoch=epoch,
        )
