"""``compensate --objective=local``: trains one layer after the other, in an open run folder."""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from grasp_lightning import processes
from grasp_lightning.callbacks.best_weights import ValidateLastStep
from grasp_lightning.callbacks.expected_warnings import expected_warnings
from grasp_lightning.callbacks.history import TrainingHistory
from grasp_lightning.callbacks.layer_fit import TrainingStore, fit_layers
from grasp_lightning.callbacks.placement import placement
from grasp_lightning.callbacks.progress import StepProgressBar
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.callbacks.time_limit import TimeLimit
from grasp_lightning.callbacks.training_checkpoint import TrainingCheckpoint
from grasp_lightning.commands.teacher import DenseModel
from grasp_lightning.commands.training import (
    TrainingSummary,
    new_loggers,
    new_trainer,
    time_limit_of,
)
from grasp_lightning.config import CompensateConfig
from grasp_lightning.config.values import seconds_of
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.progress import track
from grasp_lightning.reporting.metrics import Change
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.folder import check_free_space
from grasp_lightning.storage.stages import StageFiles, StageResult
from grasp_lightning.storage.training import RunNotes
from grasp_lightning.training.compensation import make_trainable
from grasp_lightning.training.layer_streams import HiddenStates
from grasp_lightning.training.local import LocalModule, stage_errors
from grasp_lightning.training.local_stages import LocalStage
from grasp_lightning.training.local_streams import LocalData, PairedStreams

_GIGA = 10**9
_LEAST_SECONDS = 1e-3  # of a stage: one step
_NOTE = "layer_error_{}"


class _Started(NamedTuple):
    """What all stages of one start share."""

    data: LocalData
    streams: PairedStreams
    loggers: Sequence[Logger]


@dataclass(eq=False)
class LocalRun:
    """Trains the layers of a model, stage by stage, on the hidden states of the dense model.

    ``history`` includes the steps of all stages. ``digest`` is the hash of the model's weights, and
    ``rewritten`` names further parameters for ``train: replaced``.
    """

    config: CompensateConfig
    run: RunFolder
    view: DecoderView
    dense: DenseModel
    data: TrainingData
    stages: list[LocalStage]
    notes: RunNotes
    stop: StopRequest
    digest: str = field(kw_only=True)
    rewritten: Collection[str] = field(default=(), kw_only=True)
    history: TrainingHistory = field(default_factory=TrainingHistory, init=False)

    def __post_init__(self) -> None:
        self._files = StageFiles(self.run)
        self._errors: list[float] = []
        self._seconds, self._planned, self._tokens, self._num_stages = 0.0, 0, 0, 0
        self.model_hashes = {"model": self.digest, "teacher": self.dense.digest}
        make_trainable(self.view, self.config.train, self.config.lora, self.rewritten)
        parameters = self.view.model.named_parameters()
        # A streamed layer gets new parameters whenever it is read, so they are known by name.
        self._sizes = {name: p.numel() for name, p in parameters if p.requires_grad}
        self.view.model.requires_grad_(False)

    @property
    def can_validate(self) -> bool:
        """Whether samples were set aside for validation."""
        return len(self.data.samples.validation) > 0

    def validation_loss(self) -> float:
        """Return the mean over stages of the normalised error on the samples set aside.

        Raises:
            NumericsError: If an error is NaN or infinite.
        """
        with self._hidden() as hidden, frozen(self.view.model):
            data = LocalData(self.data, hidden, validates=True, trains=False)
            streams = PairedStreams(self._dense_view, self.view, data)
            stages = track(self.stages, "hidden states")
            errors = stage_errors(streams, stages, self.config.local.scale)
        for stage, error in zip(self.stages, errors, strict=True):
            if not math.isfinite(error):
                raise NumericsError(
                    f"the error of the hidden states after decoder layer {stage.last} is {error}: "
                    "the model or distillation.teacher gives NaN or infinity; "
                    f"{nan_advice(self.view.model.dtype, 'lower optimizer.learning_rate')}"
                )
        if self.notes.noted(_NOTE.format(0)) is None:  # it is not trained yet
            self.notes.note_all({_NOTE.format(n): error for n, error in enumerate(errors)})
        self._errors = errors
        return sum(errors) / len(errors)

    def fit(self) -> None:
        """Train every stage, from the bottom; the results of finished ones are read.

        Stages that have nothing to train, or no error, only move the hidden states.
        """
        waiting = sum(bool(self._trained_of(stage)) for stage in self.stages)
        is_exact = True
        with expected_warnings(), self._started() as started:
            begun = time.monotonic()
            for number, stage in enumerate(self.stages):
                moved = time.monotonic()
                if number:
                    started.streams.advance_compressed(self.stages[number - 1])
                mean_square = started.streams.advance_dense(stage)
                moved = time.monotonic() - moved
                is_exact = is_exact and started.streams.agree(stage)
                is_trainable = bool(self._trained_of(stage))
                if is_exact or not is_trainable:
                    waiting -= is_trainable
                    continue
                self._num_stages += 1
                result = self._files.load(number)
                if result is not None:
                    self._remember(result)
                else:
                    spent = time.monotonic() - begun
                    limit = self._limit(spent, (waiting - 1) * moved, waiting)
                    result = self._trained(number, started, mean_square, limit, spent)
                self._take(number, result)
                begun, waiting = time.monotonic(), waiting - 1

    @property
    def summary(self) -> TrainingSummary:
        """The training, once it is finished."""
        before = [self.notes.noted(_NOTE.format(n)) for n, _ in enumerate(self._errors)]
        per_epoch = self.data.steps().steps_per_epoch
        return TrainingSummary(
            history=self.history,
            num_parameters=sum(self._sizes.values()),
            num_tokens=self._tokens,
            epochs=len(self.history.steps) / (max(self._num_stages, 1) * per_epoch),
            best_step=None,
            time_limit=time_limit_of(self.config, self._planned, self._seconds),
            validation_tokens=self.data.samples.validation.num_tokens,
            layer_errors={
                str(stage.last): Change(before=earlier, after=error)
                for stage, earlier, error in zip(self.stages, before, self._errors, strict=False)
                if earlier is not None
            },
        )

    @cached_property
    def _dense_view(self) -> DecoderView:
        return DecoderView(self.dense.load())

    def _trained_of(self, stage: LocalStage) -> list[str]:
        """Return the full names of the trained parameters of a stage."""
        layers = range(stage.first, stage.last + 1)
        starts = tuple(f"{self.view.layers_name}.{layer}." for layer in layers)
        return [name for name in self._sizes if name.startswith(starts)]

    @contextmanager
    def _started(self) -> Iterator[_Started]:
        validates = self.config.training.validate_every is not None
        with self._hidden() as hidden, frozen(self.view.model):
            data = LocalData(self.data, hidden, validates=validates)
            self._check_space(data)
            streams = PairedStreams(self._dense_view, self.view, data)
            yield _Started(data, streams, new_loggers(self.config, self.run))

    @contextmanager
    def _hidden(self) -> Iterator[HiddenStates]:
        with TemporaryDirectory() as folder:
            yield HiddenStates(Path(folder), self.config.local.max_memory * _GIGA)

    def _check_space(self, data: LocalData) -> None:
        """Refuse hidden states that fit neither into memory nor on the disk."""
        tokens = sum(data.num_tokens(rows) for rows in data.batches().values())
        element = self.view.model.dtype.itemsize + self._dense_view.model.dtype.itemsize
        needed = tokens * self.dense.hidden_size * element
        beyond = needed - self.config.local.max_memory * _GIGA
        number = processes.num_processes()
        key = "TMPDIR, or raise local.max_memory"
        check_free_space(Path(gettempdir()), max(int(beyond), 0) * number, key)

    def _limit(self, spent: float, reserved: float, waiting: int) -> TimeLimit | None:
        """Return an equal share of the time that is left for training.

        Args:
            spent: Seconds since the stage before.
            reserved: Seconds that the hidden states will take in later stages.
            waiting: Number of stages that are not trained yet.
        """
        training = self.config.training
        if training.max_time is None:
            return None
        left = seconds_of(training.max_time) - self._seconds - spent - reserved
        (share, *_) = processes.gather(max(left / waiting, _LEAST_SECONDS))
        return TimeLimit(share, self.data, training.validate_every)

    def _trained(
        self,
        number: int,
        started: _Started,
        mean_square: float,
        limit: TimeLimit | None,
        spent: float,
    ) -> StageResult:
        """Train a stage from its checkpoint, if there is one, and store the result."""
        stage, history, data = self.stages[number], self.history, started.data
        config, names = self.config, self._trained_of(stage)
        steps, validations = len(history.steps), len(history.validations)
        store = self._files.running(number)
        data.restart(f"{stage} {names}")
        with started.streams.with_weights(stage) as run:
            module = LocalModule(
                {name: self.view.model.get_parameter(name).detach() for name in names},
                data,
                run,
                config.optimizer,
                mean_square=mean_square if config.local.scale == "layer" else None,
                done=steps,
                is_limited=limit is not None,
                keeps_best=config.training.keep == "best",
            )
            trainer = self._trainer(stage, limit, store, started.loggers)
            fit_layers(trainer, module, data, store, self.stop)
        planned = 0 if limit is None else limit.planned_steps or len(history.steps) - steps
        rows = zip(history.steps[steps:], history.speeds[steps:], strict=True)
        result = StageResult(
            weights=module.trained(),
            steps=[(loss, rate, speed) for (loss, rate), speed in rows],
            validations=history.validations[validations:],
            seconds=self._seconds + spent + (0.0 if limit is None else limit.seconds),
            planned_steps=self._planned + planned,
        )
        self._files.save(number, result)
        return result

    def _trainer(
        self,
        stage: LocalStage,
        limit: TimeLimit | None,
        store: TrainingStore,
        loggers: Sequence[Logger],
    ) -> L.Trainer:
        settings, device = self.config.trainer, self.view.model.device
        layers = f"layer {stage.first}" + (f" to {stage.last}" if stage.last > stage.first else "")
        saving = TrainingCheckpoint(
            store.save, every_seconds=settings.checkpoint_seconds, stop=self.stop
        )
        ends: list[L.Callback] = [] if limit is None else [limit]
        keeps_best = self.config.training.keep == "best"
        if keeps_best:
            ends.append(ValidateLastStep(len(self.data.steps())))
        return new_trainer(
            self.config,
            device,
            [self.history, *ends, StepProgressBar(layers), saving],
            loggers,
            is_training=True,
            # The weights before the first step count, too.
            num_sanity_val_steps=-1 if keeps_best else 0,
            **placement(settings, device),
        )

    def _remember(self, result: StageResult) -> None:
        """Add a stage of an earlier start to the history."""
        self.history.steps += [(loss, rate) for loss, rate, _ in result.steps]
        self.history.speeds += [speed for *_, speed in result.steps]
        self.history.validations += result.validations

    def _take(self, number: int, result: StageResult) -> None:
        """Put the trained weights of a stage into the model."""
        steps = self.data.steps()
        self._tokens += sum(steps.num_tokens(n) for n, _ in enumerate(result.steps))
        self._seconds, self._planned = result.seconds, result.planned_steps
        weights = streamed_weights(self.view.model)
        if weights is not None:
            weights.read_from(self._files.stored(number, result.weights))
            return
        with torch.no_grad():
            for name, value in result.weights.items():
                self.view.model.get_parameter(name).copy_(value)
