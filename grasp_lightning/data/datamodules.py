"""Calibration windows for a Lightning Trainer."""

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.windows import TokenWindows, calibration_windows, check_window_options

WindowBatch = dict[str, Tensor]


class CalibrationData(L.LightningDataModule):
    """The same batches in the same order for ``fit`` and for ``predict``.

    A batch holds ``input_ids``, ``mask``, ``targets``, each ``(B, T)``, and ``index`` ``(B,)``, the
    position of each window in ``windows``. Text is read when it is first needed. A number in the
    configuration that is too small is a ``ConfigError``.

    Args:
        config: Section ``calibration`` of the configuration.
        tokenizer: Tokenizer of the model.
        seed: Seed of the choice of windows.
        windows: Windows that are there already; then only ``config.batch_size`` is used.
    """

    def __init__(
        self,
        config: CalibrationConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        windows: TokenWindows | None = None,
    ) -> None:
        super().__init__()
        check_window_options(config, "calibration")
        self._config = config
        self._tokenizer = tokenizer
        self._seed = seed
        self._windows = windows

    @property
    def windows(self) -> TokenWindows:
        """The calibration windows, built on first access."""
        if self._windows is None:
            self._windows = calibration_windows(self._config, self._tokenizer, self._seed)
        return self._windows

    @property
    def fingerprint(self) -> dict[str, str]:
        """What identifies the windows in a plan: ``calibration``, their hash, and ``seed``."""
        return {"calibration": self.windows.sha256, "seed": str(self._seed)}

    def setup(self, stage: str) -> None:  # noqa: ARG002  # Lightning passes it by name
        """Build the windows, so that a corpus that cannot be read fails before the first batch.

        Args:
            stage: What the Trainer is about to do; the data is the same for all.
        """
        self._windows = self.windows

    def train_dataloader(self) -> DataLoader[WindowBatch]:
        """Return the batches, in order and not shuffled.

        Returns:
            A loader over all windows.
        """
        return self._loader()

    def predict_dataloader(self) -> DataLoader[WindowBatch]:
        """Return the batches, in order.

        Returns:
            A loader over all windows.
        """
        return self._loader()

    def _loader(self) -> DataLoader[WindowBatch]:
        rows = _WindowRows(self.windows)
        return DataLoader(rows, batch_size=self._config.batch_size, shuffle=False, num_workers=0)


class _WindowRows(Dataset[WindowBatch]):
    """One window per item, without the batch dimension."""

    def __init__(self, windows: TokenWindows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> WindowBatch:
        return {key: value[0] for key, value in self._windows.batch([index]).items()}
