"""Decides what of a model may change in a compensation, before the optimizer is made."""

from typing import Any

import lightning as L
import torch

from grasp_lightning.config import LoraSettings, TrainMode
from grasp_lightning.training.compensation import CompensationModule, make_trainable


class TrainableParameters(L.Callback):
    """Freezes the model, and makes trainable what a mode of training changes.

    What is trained is left on the module (``trained``). A model that has no low-rank linears where
    factors are to be trained, or a target that matches no linear, ends the fit with an error of one
    line.

    Args:
        train: ``lora``: adapters on all linears; ``factors``: the factors of low-rank linears,
            and narrowed linears, themselves; ``lora_on_factors``: adapters on these alone.
        lora: Rank, scale, dropout and targets of adapters.
        gradient_checkpointing: Compute activations again in the backward pass to save memory.
        seed: Seed of the adapters' first values.
    """

    def __init__(
        self,
        train: TrainMode = "lora",
        lora: LoraSettings | None = None,
        *,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        self._train = train
        self._lora = lora or LoraSettings()
        self._gradient_checkpointing = gradient_checkpointing
        self._seed = seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Decide, when a fit is set up; the optimizer comes after it.

        Args:
            trainer: The Trainer.
            pl_module: A ``CompensationModule``.
            stage: What the Trainer is about to do.
        """
        del trainer
        module = compensation_module(pl_module)
        if stage != "fit" or (module.trained is not None and module.is_trainable):
            return
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            module.trained = make_trainable(module.view, self._train, self._lora)
        if self._gradient_checkpointing:
            model: Any = module.model  # Any: untyped in transformers
            model.activation_checkpointing_enable({"use_reentrant": False})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave a model that keeps its activations again."""
        del trainer
        if self._gradient_checkpointing:
            model: Any = compensation_module(pl_module).model  # Any: untyped in transformers
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()


def compensation_module(module: L.LightningModule) -> CompensationModule:
    """Return the module as a ``CompensationModule``.

    Args:
        module: What a Trainer runs.

    Returns:
        The same object.

    Raises:
        TypeError: If it is another LightningModule.
    """
    if not isinstance(module, CompensationModule):
        raise TypeError(f"this callback works on a CompensationModule, got {type(module).__name__}")
    return module
