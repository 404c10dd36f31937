"""Training samples for a Lightning Trainer."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from grasp_lightning import processes
from grasp_lightning.config import (
    BatchOrder,
    InstructionConfig,
    TextConfig,
    TrainingConfig,
)
from grasp_lightning.config.values import check_values
from grasp_lightning.data.batching import (
    Extras,
    MicroBatch,
    TokenSamples,
    collate,
    epoch_batches,
)
from grasp_lightning.data.datamodules.calibration import LazyBatches
from grasp_lightning.data.instruction_files import Instructions, read_instructions
from grasp_lightning.data.instructions import (
    TokenizedInstructions,
    split_instructions,
    tokenize_instructions,
)
from grasp_lightning.data.section_windows import training_windows
from grasp_lightning.data.self_text import Sampler
from grasp_lightning.data.steps import StepBatch, StepOptions, TrainingSteps
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError
from grasp_lightning.models.next_token import on_device

logger = logging.getLogger(__name__)


class TrainingSamples(NamedTuple):
    """Training samples (at least one), validation samples, and counts of all for reports."""

    train: TokenSamples
    validation: TokenSamples
    counts: Mapping[str, int]


class TrainingData(L.LightningDataModule):
    """Training samples grouped into optimizer steps, and validation samples.

    A Trainer sees one epoch (``max_epochs=1``) that contains the steps of all epochs, each a list
    of micro-batches. Text is read on first use.

    Args:
        training: Batch sizes, and how long to train.
        seed: Seed for the validation split and the sample order.

    Attributes:
        extras: What is added to the micro-batches of ``train`` and ``validation``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, training: TrainingConfig, seed: int
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.training = training
        self.seed = seed
        self.extras: Mapping[str, Extras] = {}

    @property
    @abstractmethod
    def order(self) -> BatchOrder:
        """How samples are grouped into batches."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Maximum tokens per row."""

    @cached_property
    @abstractmethod
    def samples(self) -> TrainingSamples:
        """The samples, read on first access."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """Identifies the samples by their hashes and the seed."""
        return {
            "train": self.samples.train.sha256,
            "validation": self.samples.validation.sha256,
            "seed": str(self.seed),
        }

    def steps(self) -> TrainingSteps:
        """Return a new sequence of all optimizer steps."""
        options = StepOptions.of(
            self.training, order=self.order, row_length=self.row_length, seed=self.seed
        )
        return TrainingSteps(self.samples.train, options, self.extras.get("train"))

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning passes it by name
        """Read the samples, so that unreadable text fails before the first step."""
        _ = self.samples

    def transfer_batch_to_device(
        self, batch: StepBatch | MicroBatch, device: torch.device, dataloader_idx: int
    ) -> StepBatch | MicroBatch:
        """Move the tokens; the rest is read on the CPU."""
        del dataloader_idx
        if isinstance(batch, StepBatch):
            return batch._replace(parts=[on_device(part, device) for part in batch.parts])
        return on_device(batch, device)

    def train_dataloader(self) -> TrainingSteps:
        """Return all optimizer steps, as a loader whose position is saved in checkpoints."""
        return self.steps()

    def val_dataloader(self) -> DataLoader[MicroBatch] | list[object]:
        """Return the validation samples in micro-batches of fixed order, or an empty list.

        Processes share the samples, and each gets the same number of micro-batches.
        """
        validation = self.samples.validation
        if len(validation) == 0:
            return []
        rows = epoch_batches(
            validation,
            self.training.micro_batch_size,
            order="packed" if self.order == "packed" else "length_grouped",
            row_length=self.row_length,
            seed=0,
            epoch=0,
        )
        own = processes.own_batches(rows, 1)
        extras = self.extras.get("validation")
        builders = [
            partial(collate, validation, part[0], counts=counts, extras=extras)
            for part, counts in own
        ]
        return DataLoader(LazyBatches(builders), batch_size=None)


class InstructionData(TrainingData):
    """Instructions and answers in the Alpaca template, from section ``data``.

    A number that is too small is a ``ConfigError``.
    """

    def __init__(
        self,
        config: InstructionConfig,
        tokenizer: PreTrainedTokenizerBase,
        training: TrainingConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, training or TrainingConfig(), seed)
        check_values(config, "data.")
        self.config = config

    @property
    def order(self) -> BatchOrder:
        """How samples are grouped into batches."""
        return self.config.order

    @property
    def row_length(self) -> int:
        """Maximum tokens per row."""
        return self.config.max_length

    @cached_property
    def samples(self) -> TrainingSamples:
        """The samples, read on first access; too few of them are a ``ConfigError``."""
        config = self.config
        read = read_instructions(config.source, config.path, "data")
        split = split_instructions(
            read, num_validation=config.num_validation, num_train=config.num_train, seed=self.seed
        )
        train, validation = self._tokens(split.train), self._tokens(split.validation)
        if train.counts.kept < train.counts.read:
            logger.warning("%s: %s", split.train.name, train.counts)
        counts = {**asdict(train.counts), "read": len(read), "train": len(train.tokens)}
        return TrainingSamples(
            train.tokens, validation.tokens, {**counts, "validation": len(validation.tokens)}
        )

    def _tokens(self, instructions: Instructions) -> TokenizedInstructions:
        return tokenize_instructions(
            instructions,
            self.tokenizer,
            max_length=self.config.max_length,
            train_on_inputs=self.config.train_on_inputs,
            add_eos=self.config.add_eos,
            add_bos=self.config.add_bos,
        )


class TextData(TrainingData):
    """Windows of plain text, from section ``text``; too small a number is a ``ConfigError``.

    Args:
        sample: Writes text with the dense model, for ``source: self``.
    """

    def __init__(
        self,
        config: TextConfig,
        tokenizer: PreTrainedTokenizerBase,
        training: TrainingConfig | None = None,
        seed: int = 0,
        sample: Sampler | None = None,
    ) -> None:
        super().__init__(tokenizer, training or TrainingConfig(), seed)
        if config.num_samples < 1 or config.num_validation < 0:
            raise ConfigError(
                "text.num_samples must be at least 1 and text.num_validation at least 0, got "
                f"{config.num_samples} and {config.num_validation}"
            )
        self.config = config
        self._sample = sample

    @property
    def order(self) -> BatchOrder:
        """Windows all have the same length, so there is nothing to group."""
        return "shuffled"

    @property
    def row_length(self) -> int:
        """Tokens per window."""
        return self.config.seqlen

    @cached_property
    def samples(self) -> TrainingSamples:
        """The windows, read on first access; a text that is too short is a ``DataError``."""
        train, validation = training_windows(
            self.config, self.tokenizer, self.seed, sample=self._sample
        )
        return TrainingSamples(
            _as_samples(train),
            _as_samples(validation),
            {"train": len(train), "validation": len(validation)},
        )


def _as_samples(windows: TokenWindows) -> TokenSamples:
    return TokenSamples.from_rows([*windows.input_ids], [*windows.targets])
