from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.section_windows import calibration_windows
from grasp_lightning.data.windows import pack_windows
from grasp_lightning.errors import ConfigError, DataError

CONFIG = CalibrationConfig(source="pydoc", num_samples=5, seqlen=16, batch_size=2)


class Recorder(L.LightningModule):
    """Keeps the batches that a Trainer gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(batch)
        return self.weight * 1.0

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(batch)
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(kind: str, data: CalibrationData) -> list[dict[str, Tensor]]:
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    (trainer.fit if kind == "fit" else trainer.predict)(recorder, datamodule=data)
    return recorder.seen


@pytest.mark.parametrize(("kind", "epochs"), [("fit", 2), ("predict", 1)])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_sees_every_window_in_order_in_every_epoch(
    tokenizer: PreTrainedTokenizerFast, kind: str, epochs: int
) -> None:
    data = CalibrationData(CONFIG, tokenizer)
    seen = run(kind, data)
    assert [batch["index"].tolist() for batch in seen] == [[0, 1], [2, 3], [4]] * epochs
    for key in ("input_ids", "mask", "targets"):
        rows = torch.cat([batch[key] for batch in seen[:3]])
        assert torch.equal(rows, getattr(data.windows, key))


def test_windows_are_those_of_the_config_and_the_seed_and_built_once(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    data = CalibrationData(CONFIG, tokenizer, seed=7)
    assert data.windows.sha256 == calibration_windows(CONFIG, tokenizer, seed=7).sha256
    assert data.windows is data.windows


def test_given_windows_are_used_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_windows(["abcdef"], tokenizer, seqlen=2, add_bos=False)
    data = CalibrationData(CONFIG, tokenizer, windows=windows)
    data.setup("fit")
    assert data.windows is windows
    assert [batch["index"].tolist() for batch in data.train_dataloader()] == [[0, 1], [2]]


def test_setup_fails_on_a_corpus_that_is_too_short(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("short")
    config = CalibrationConfig(source="file", path=str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="gives 0 windows of 512 tokens"):
        CalibrationData(config, tokenizer).setup("fit")


def test_a_wrong_batch_size_is_refused_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"calibration\.batch_size must be at least 1, got 0"):
        CalibrationData(CalibrationConfig(source="pydoc", batch_size=0), tokenizer)
