"""Calibration windows for a Lightning Trainer."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from grasp_lightning import processes
from grasp_lightning.config import CalibrationConfig
from grasp_lightning.config.values import check_values
from grasp_lightning.data.section_windows import calibration_windows
from grasp_lightning.data.self_text import Sampler
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.models.next_token import on_device


class CalibrationData(L.LightningDataModule):
    """The same batches in the same order for ``fit`` and for ``predict``.

    A batch contains ``input_ids``, ``mask`` and ``targets``, each ``(B, T)``, and ``index``
    ``(B,)``, the position of each window in ``windows``. Text is read on first use. A number in
    the configuration that is too small is a ``ConfigError``.

    Args:
        seed: Seed for the choice of windows.
        windows: Existing windows; then only ``config.batch_size`` is used.
        sample: Writes text with the model, for ``source: self``.

    Attributes:
        done: Indices of windows that the batches skip.
    """

    def __init__(
        self,
        config: CalibrationConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        windows: TokenWindows | None = None,
        sample: Sampler | None = None,
    ) -> None:
        super().__init__()
        check_values(config, "calibration.")
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._windows = windows
        self._sample = sample
        self.done: frozenset[int] = frozenset()

    def without(self, windows: Iterable[int]) -> "CalibrationData":
        """Return a data module over the same windows whose batches skip the given indices."""
        rest = CalibrationData(self._config, self._tokenizer, self._seed, self.windows)
        rest.done = frozenset(windows)
        return rest

    @property
    def batches(self) -> list[list[int]]:
        """Window indices of every batch of this process, in order.

        All processes have the same number of batches: when windows run out, the last ones are
        empty, and the Trainer gets padding instead.
        """
        left = [index for index in range(len(self.windows)) if index not in self.done]
        shares = processes.own_batches(left, self._config.batch_size)
        return [list(indices) if counts else [] for indices, counts in shares]

    @property
    def windows(self) -> TokenWindows:
        """The calibration windows, built on first access."""
        if self._windows is None:
            self._windows = calibration_windows(
                self._config, self._tokenizer, self._seed, sample=self._sample
            )
        return self._windows

    @property
    def seed(self) -> int:
        """Seed for the choice of windows."""
        return self._seed

    @property
    def batch_size(self) -> int:
        """Windows per forward pass."""
        return self._config.batch_size

    @property
    def fingerprint(self) -> dict[str, str]:
        """Identifies the windows in a plan: ``calibration``, their hash, and ``seed``."""
        return {"calibration": self.windows.sha256, "seed": str(self._seed)}

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning passes it by name
        """Build the windows, so that an unreadable corpus fails before the first batch."""
        self._windows = self.windows

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the batches, in order and not shuffled."""
        # One item is one batch: Lightning replaces samplers, and would change which windows meet.
        windows = self.windows
        builders = [partial(windows.batch, b) if b else windows.padding for b in self.batches]
        return DataLoader(LazyBatches(builders), batch_size=None)

    predict_dataloader = train_dataloader

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Move the tokens; the rest is read on the CPU."""
        del dataloader_idx
        return on_device(batch, device)


class LazyBatches(Dataset[dict[str, Tensor]]):
    """Builds each batch when a loader needs it."""

    def __init__(self, builders: Sequence[Callable[[], dict[str, Tensor]]]) -> None:
        self._builders = builders

    def __len__(self) -> int:
        return len(self._builders)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._builders[index]()
