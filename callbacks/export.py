"""Merges adapters at the end of a compensation, and writes the model."""

from pathlib import Path

import lightning as L
from transformers import PreTrainedTokenizerBase

from grasp_lightning.callbacks.trainable import compensation_module
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.training.compensation import merge_adapters


class ExportMergedModel(L.Callback):
    """Merges adapters after a fit, so that the model has as many parameters as before it.

    An adapter on a dense linear is added to its weight; adapters on the factors of a low-rank
    linear are added to the factors, so it stays low-rank.

    Args:
        folder: Hugging Face folder for the merged model; None only merges.
    """

    def __init__(
        self, folder: str | Path | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge and write; if nothing was made trainable, this is a RuntimeError."""
        module = compensation_module(pl_module)
        if module.trained is None:
            raise RuntimeError("nothing was trained: add TrainableParameters to the callbacks")
        merge_adapters(module.trained)
        if self._folder is not None and trainer.is_global_zero:
            save_model(module.model, self._folder, tokenizer=self._tokenizer)
