"""Chooses the trainable parameters of a compensation, before the optimizer is made."""

from collections.abc import Collection
from typing import Any

import lightning as L
import torch

from grasp_lightning.config import LoraSettings, TrainMode
from grasp_lightning.training.compensation import CompensationModule, make_trainable


class TrainableParameters(L.Callback):
    """Freezes the model, except for what the mode of training changes.

    The module keeps what is trained (``trained``). Training factors of a model without low-rank
    linears, or a target that matches no linear, is an error.

    Args:
        train: ``lora``: adapters on all linears; ``factors``: the factors of low-rank linears and
            the narrowed linears, without biases; ``lora_on_factors``: adapters on these only;
            ``replaced``: these linears with biases, seams, and ``rewritten`` parameters; ``all``:
            every parameter of the decoder layers.
        lora: Rank, scale, dropout and targets of adapters.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        seed: Seed for the initial adapters.
        rewritten: Further parameters for ``replaced``, by name, see ``rewritten_parameters``.
    """

    def __init__(
        self,
        train: TrainMode = "lora",
        lora: LoraSettings | None = None,
        *,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        rewritten: Collection[str] = (),
    ) -> None:
        self._train = train
        self._lora = lora or LoraSettings()
        self._gradient_checkpointing = gradient_checkpointing
        self._seed = seed
        self._rewritten = frozenset(rewritten)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make parameters trainable when a fit is set up, before the optimizer exists."""
        module = compensation_module(pl_module)
        if stage != "fit" or (module.trained is not None and module.is_trainable):
            return
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            module.trained = make_trainable(module.view, self._train, self._lora, self._rewritten)
        if self._gradient_checkpointing:
            model: Any = module.model  # Any: untyped in transformers
            model.activation_checkpointing_enable({"use_reentrant": False})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Turn gradient checkpointing off again."""
        if self._gradient_checkpointing:
            model: Any = compensation_module(pl_module).model  # Any: untyped in transformers
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()


def compensation_module(module: L.LightningModule) -> CompensationModule:
    """Return the module as a ``CompensationModule``; another one is a TypeError."""
    if not isinstance(module, CompensationModule):
        raise TypeError(f"this callback works on a CompensationModule, got {type(module).__name__}")
    return module
