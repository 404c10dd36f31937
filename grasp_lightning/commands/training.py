"""The Trainer of ``compensate``: callbacks, loggers, and a checkpoint for resuming."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.best_weights import (
    BestWeights,
    StopWithoutProgress,
    ValidateLastStep,
)
from grasp_lightning.callbacks.expected_warnings import expected_warnings
from grasp_lightning.callbacks.export import ExportMergedModel
from grasp_lightning.callbacks.history import TrainingHistory
from grasp_lightning.callbacks.placement import placement
from grasp_lightning.callbacks.progress import StepProgressBar
from grasp_lightning.callbacks.split_model import GatherTrained
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.callbacks.time_limit import TimeLimit
from grasp_lightning.callbacks.trainable import TrainableParameters
from grasp_lightning.callbacks.training_checkpoint import TrainingCheckpoint
from grasp_lightning.config import CompensateConfig
from grasp_lightning.config.values import seconds_of
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.reporting.metrics import Change, LimitedTime
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import CHECKPOINTS, LOGS
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors
from grasp_lightning.storage.training import TRAINING_CHECKPOINT, TrainingFile
from grasp_lightning.training.compensation import VALIDATION_LOSS, CompensationModule
from grasp_lightning.training.strategies import is_sharded_strategy, sharded_strategy

_BEST = f"{CHECKPOINTS}/best.safetensors"


class TrainingSummary(NamedTuple):
    """What a finished training says of itself.

    Attributes:
        num_parameters: Number of trained parameters.
        num_tokens: Tokens trained on, over all steps.
        epochs: How often each sample was seen.
        best_step: Number of steps behind the kept weights; None for the last ones.
        validation_tokens: Tokens behind the validation loss.
        layer_errors: Error of the hidden states after each layer, by its number.
    """

    history: TrainingHistory
    num_parameters: int
    num_tokens: int
    epochs: float
    best_step: int | None
    time_limit: LimitedTime
    validation_tokens: int
    layer_errors: Mapping[str, Change[float]]


@dataclass(eq=False)
class TrainingRun:
    """Validates and trains a module in an open run folder.

    ``history`` includes the steps before an interruption. If the model is split over processes,
    ``gathered`` has the trained weights in rank 0, not merged. ``rewritten`` names further
    parameters for ``train: replaced``.
    """

    config: CompensateConfig
    run: RunFolder
    module: CompensationModule
    data: TrainingData
    stop: StopRequest
    device: torch.device = field(kw_only=True)
    rewritten: Collection[str] = field(default=(), kw_only=True)
    history: TrainingHistory = field(default_factory=TrainingHistory, init=False)
    gathered: GatherTrained = field(default_factory=GatherTrained, init=False)

    def __post_init__(self) -> None:
        self._is_sharded = is_sharded_strategy(self.config.trainer.strategy)
        self._best = BestWeights(_Best(self.run))
        training = self.config.training
        self.time_limit: TimeLimit | None = None
        if training.max_time is not None:
            seconds = seconds_of(training.max_time)
            self.time_limit = TimeLimit(seconds, self.data, training.validate_every)

    @property
    def can_validate(self) -> bool:
        """Whether samples were set aside for validation."""
        return len(self.data.samples.validation) > 0

    @property
    def model_hashes(self) -> Mapping[str, str]:
        """Fingerprints of the model before training and of any teacher."""
        return self.module.model_hashes

    @property
    def summary(self) -> TrainingSummary:
        """The training, once it is finished."""
        assert self.module.trained is not None  # the fit trains it
        limited, limit = LimitedTime(), self.time_limit
        if limit is not None:
            limited = time_limit_of(self.config, limit.planned_steps, limit.seconds)
        return TrainingSummary(
            history=self.history,
            num_parameters=self.module.trained.num_parameters,
            num_tokens=self.module.num_trained_tokens,
            epochs=len(self.history.steps) / self.data.steps().steps_per_epoch,
            best_step=self._best.step,
            time_limit=limited,
            validation_tokens=self.data.samples.validation.num_targets,
            layer_errors={},
        )

    def validation_loss(self) -> float:
        """Return the mean loss on the samples set aside, in nats per predicted token."""
        with expected_warnings():
            trainer = self._trainer([StepProgressBar("validation")])
            (result,) = trainer.validate(self.module, datamodule=self.data, verbose=False)
        self._back_to_device()
        return float(result[VALIDATION_LOSS])

    def fit(self, measure: L.Callback | None = None) -> None:
        """Train from the last checkpoint, if any, and merge; ``measure`` runs before and after."""
        checkpoint = TrainingFile(self.run).load()
        with expected_warnings(), self.stop.deferred():
            loggers = new_loggers(self.config, self.run)
            trainer = self._trainer(self._callbacks(measure), loggers, is_training=True)
            trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        if not self._is_sharded:
            self._back_to_device()
        elif processes.num_processes() == 1:
            processes.leave()  # a process group of one, which the strategy formed

    def _back_to_device(self) -> None:
        # A Trainer leaves its module on the CPU.
        self.module.model.to(self.device)  # type: ignore[arg-type]  # transformers wraps it with a narrow type

    def _callbacks(self, measure: L.Callback | None) -> list[L.Callback]:
        config, training = self.config, self.config.training
        checkpointing = training.gradient_checkpointing
        trainable = TrainableParameters(
            config.train,
            config.lora,
            gradient_checkpointing=checkpointing,
            seed=config.seed,
            rewritten=self.rewritten,
        )
        callbacks: list[L.Callback] = [trainable, self.history]
        if training.keep == "best":
            callbacks += [self._best, ValidateLastStep(len(self.data.steps()))]
        if training.patience is not None:
            callbacks.append(StopWithoutProgress(training.patience))
        checkpoint = TrainingCheckpoint(
            TrainingFile(self.run).save,
            every_seconds=config.trainer.checkpoint_seconds,
            stop=self.stop,
        )
        if self.time_limit is not None:
            callbacks.append(self.time_limit)
        if measure is not None:  # after the time limit, whose clock it would keep running
            callbacks.append(measure)
        callbacks.append(self.gathered if self._is_sharded else ExportMergedModel())
        return [*callbacks, StepProgressBar("training"), checkpoint]

    def _trainer(
        self,
        callbacks: list[L.Callback],
        loggers: Sequence[Logger] = (),
        *,
        is_training: bool = False,
    ) -> L.Trainer:
        return new_trainer(
            self.config,
            self.device,
            callbacks,
            loggers,
            is_training=is_training,
            **self._placement(is_training),
        )

    def _placement(self, is_training: bool) -> dict[str, Any]:
        arguments = placement(self.config.trainer, self.device)
        if self._is_sharded:
            clip = self.config.optimizer.gradient_clip
            arguments["strategy"] = sharded_strategy(self.config.trainer.strategy, clip)
        elif is_training and processes.num_processes() > 1:
            # Buffers do not change, and are the same in all processes.
            arguments["strategy"] = DDPStrategy(broadcast_buffers=False)
        return arguments


def time_limit_of(
    config: CompensateConfig, planned_steps: int | None, seconds: float
) -> LimitedTime:
    """Return what a training planned and took; nothing without a limit."""
    if config.training.max_time is None:
        return LimitedTime()
    most = seconds_of(config.training.max_time)
    return LimitedTime(max_seconds=most, planned_steps=planned_steps, seconds=seconds)


def new_loggers(config: CompensateConfig, run: RunFolder) -> list[Logger]:
    """Return the loggers of one start of a training."""
    logs, settings = run.live_folder(LOGS), config.loggers
    # One per start: a logger deletes earlier logs of its own name. Only rank 0 writes logs.
    taken = {path.name for path in logs.glob("start_*")}
    version = next(name for n in count(1) if (name := f"start_{n}") not in taken)
    loggers: list[Logger] = [CSVLogger(logs, name="", version=version, flush_logs_every_n_steps=10)]
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(logs, name="", version=version))
    if settings.wandb is not None:
        loggers.append(WandbLogger(project=settings.wandb, save_dir=logs))
    return loggers


def new_trainer(
    config: CompensateConfig,
    device: torch.device,
    callbacks: list[L.Callback],
    loggers: Sequence[Logger] = (),
    *,
    is_training: bool,
    num_sanity_val_steps: int = 0,
    **where: Any,  # noqa: ANN401  arguments of a Trainer
) -> L.Trainer:
    """Return a Trainer for one fit or one validation.

    Args:
        where: Devices, processes and strategy, as ``placement`` returns them.
    """
    every = config.training.validate_every if is_training else None
    return L.Trainer(
        accelerator=device.type,
        **where,
        precision=config.trainer.precision,
        max_epochs=1,
        limit_val_batches=0 if is_training and every is None else None,
        val_check_interval=every,
        check_val_every_n_epoch=None if every is not None else 1,
        num_sanity_val_steps=num_sanity_val_steps,
        callbacks=callbacks,
        logger=list(loggers) or False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        # Inference tensors that a model caches (rotary tables) cannot be used in backward.
        inference_mode=False,
        use_distributed_sampler=False,
    )


class _Best:
    """The best weights of a training so far."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def load(self) -> dict[str, Tensor]:
        processes.barrier()  # rank 0 may be writing them
        last = self._run.path(TRAINING_CHECKPOINT)
        advice = f"delete it and {last} to train again from the start"
        return TensorFile(self._run.path(_BEST), advice=advice).read()

    def save(self, state: Mapping[str, Tensor]) -> None:
        self._run.write_with(_BEST, lambda path: save_tensors(path, state))
