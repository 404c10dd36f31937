"""Trains one decoder layer to compute what a span of layers computes."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
from torch import Tensor

from grasp_lightning.callbacks.layer_fit import TrainingStore, fit_layers
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.callbacks.training_checkpoint import TrainingCheckpoint
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.surgery import in_place_of_linears, replacements
from grasp_lightning.progress import expect_passes
from grasp_lightning.stats.base import SpanTraining
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner
from grasp_lightning.training.span import SpanData, SpanModule, first_weights

NewTrainer = Callable[..., L.Trainer]
"""Makes a Trainer from its callbacks and further arguments."""


def train_span(
    view: DecoderView,
    span: SpanTraining,
    data: CalibrationData,
    new_trainer: NewTrainer,
    *,
    callbacks: Sequence[L.Callback],
    track: Callable[[Sequence[str], str], Iterable[str]],
    store: TrainingStore | None,
    every_seconds: float,
    stop: StopRequest,
    max_bytes: float,
) -> dict[str, Tensor]:
    """Return the trained parameters of the first layer of a span, by full name.

    Hidden states around the span are computed once, and again after an interruption.

    Args:
        view: The dense model, which does not change.
        callbacks: For the Trainer, before the one that saves checkpoints.
        track: Shows progress of the hidden states.
        store: Keeps a checkpoint for a later start; None keeps none.
        every_seconds: Time between two checkpoints.
        max_bytes: Memory for hidden states; the rest is stored in files.
    """
    if span.epochs == 0:
        return {name: weight.cpu().clone() for name, weight in first_weights(view, span).items()}
    with TemporaryDirectory() as folder, frozen(view.model):
        states = SpanData(data, span, HiddenStates(Path(folder), max_bytes))
        runner = LayerRunner(view)
        expect_passes(2)  # hidden states, then the training
        for number in track([str(n) for n in states.batches()], "hidden states"):
            states.fill(runner, [number])
        removed = replacements(view, span.removed, {})
        saves = [] if store is None else [_checkpoint(store, every_seconds, stop)]
        trainer = new_trainer(
            [*callbacks, *saves],
            val_check_interval=states.steps_per_epoch,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # the weights before the first step count, too
            limit_val_batches=None if states.validation else 0,
        )
        with in_place_of_linears(view, removed), runner.with_weights(span.layers[0]) as run:
            module = SpanModule(view, span, states, run)
            fit_layers(trainer, module, states, store, stop)
            return module.trained()


def _checkpoint(
    store: TrainingStore, every_seconds: float, stop: StopRequest
) -> TrainingCheckpoint:
    return TrainingCheckpoint(store.save, every_seconds=every_seconds, stop=stop)
