"""The training of one decoder layer to compute what a span of layers computes."""

from collections.abc import Sequence
from typing import Final

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import get_scheduler

from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.steps import WindowSteps
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import SpanTraining
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner
from grasp_lightning.training.layer_training import (
    ENTERING,
    LEAVING,
    LayerData,
    LayerModule,
    RunLayers,
)

WEIGHT_DECAY: Final = 1e-3
LAST_RATE: Final = 0.025  # share of the first learning rate: 2e-4 falls to 5e-6
GRADIENT_CLIP: Final = 1.0
_VALIDATION = 10  # of so many windows, one is set aside


def first_weights(view: DecoderView, span: SpanTraining) -> dict[str, Tensor]:
    """Return the parameters of a span's first layer that are trained, by full name."""
    layer, name = view.layer(span.layers[0]), f"{view.layers_name}.{span.layers[0]}"
    return {f"{name}.{key}": layer.get_parameter(key).detach() for key in span.parameters}


class SpanData(LayerData):
    """Hidden states around a span, for this process's share of the calibration windows.

    One window of ten, chosen by the seed, is set aside for validation; a single window is only
    trained on.

    Args:
        hidden: Stores the hidden states.
    """

    def __init__(self, data: CalibrationData, span: SpanTraining, hidden: HiddenStates) -> None:
        self.windows, self._span = data.windows, span
        number = len(self.windows)
        order = torch.randperm(number, generator=torch.Generator().manual_seed(data.seed)).tolist()
        set_aside = -(-number // _VALIDATION) if number > 1 else 0
        train, validation = sorted(order[set_aside:]), sorted(order[:set_aside])
        steps = WindowSteps(train, size=span.step_windows, epochs=span.epochs, seed=data.seed)
        self.steps, self.steps_per_epoch = steps, steps.steps_per_epoch
        told = {"span": str(span), **data.fingerprint}
        super().__init__(train, validation, data.batch_size, hidden, told)

    def batch(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """Return some windows as one batch."""
        return self.windows.batch(windows)

    def num_tokens(self, windows: Sequence[int]) -> int:
        """Return the number of real tokens of some windows."""
        return int(self.windows.mask[list(windows)].sum())

    def fill(self, runner: LayerRunner, numbers: Sequence[str]) -> None:
        """Store what enters and what leaves the span in some of the ``batches``."""
        rows = self.batches()
        chosen = {int(number): self.windows.batch(rows[int(number)]) for number in numbers}
        first, last = self._span.layers[0], self._span.layers[-1]
        for number, entering, leaving in runner.states_around(first, last, chosen):
            self.keep(ENTERING, rows[number], entering)
            self.keep(LEAVING, rows[number], leaving)


class SpanModule(LayerModule):
    """Trains the first layer of a span: the mean squared error to what leaves the span.

    The error is averaged over real tokens and features. It is dominated by the few features with
    massive activations, as in the publication. The weights with the lowest error on the windows set
    aside are kept, and those before the first step count too.

    Source: Chen et al., "Streamlining Redundant Layers to Compress Large Language Models",
    arXiv:2403.19135: loss, AdamW, weight decay, and the cosine from 2e-4 to 5e-6. The clipping of
    gradients at 1 is ours, as is the number of epochs. The public code clips at 5; in a fork of it,
    the rate ends at 5e-5, after 1 % warm-up and a cosine over half of the batches.

    Args:
        view: The model, frozen, with the removals of the span in place.
        run: Runs the layer with given values of its parameters.
    """

    error_name = "squared_error"
    validation_name = "validation_squared_error"
    rate_key = "method.learning_rate"

    def __init__(
        self, view: DecoderView, span: SpanTraining, data: SpanData, run: RunLayers
    ) -> None:
        super().__init__(first_weights(view, span), data, run, clip=GRADIENT_CLIP, keeps_best=True)
        self._rate, self._num_steps = span.learning_rate, len(data.steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a cosine schedule."""
        optimizer = torch.optim.AdamW(self.weights, lr=self._rate, weight_decay=WEIGHT_DECAY)
        scheduler = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=0,
            num_training_steps=self._num_steps,
            scheduler_specific_kwargs={"min_lr_rate": LAST_RATE},
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def token_errors(self, found: Tensor, expected: Tensor) -> Tensor:
        """Return the squared error, averaged over features."""
        return (found - expected).square().mean(dim=-1)
