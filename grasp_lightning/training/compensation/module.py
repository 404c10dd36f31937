"""The LightningModule of compensation: a compressed model is trained, a part of it."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, get_scheduler

from grasp_lightning import processes
from grasp_lightning.config import OptimizerConfig
from grasp_lightning.data.batching import MicroBatch
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.steps import StepBatch
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.training.compensation.adapters import Trained
from grasp_lightning.training.compensation.objective import Objective, Teacher
from grasp_lightning.training.shards import fill, whole_shape, whole_values
from grasp_lightning.training.strategies import (
    CompensationDeepSpeed,
    CompensationFSDP,
    shard_layers,
)

VALIDATION_LOSS = "validation_loss"
_FINGERPRINT, _NUM_TOKENS = "grasp_lightning_fingerprint", "grasp_lightning_trained_tokens"


class CompensationModule(L.LightningModule):
    """Trains what a callback has made trainable of a causal language model.

    A batch is what one optimizer step learns from, in micro-batches. The loss is the mean over the
    predicted tokens of the whole step, so that it does not depend on how rows are dealt out to
    micro-batches. Dropout is seeded by step, so that a training that goes on from a checkpoint
    drops what it would have dropped.

    A checkpoint holds trained parameters only, never the model they belong to; it is refused by a
    module with another model, other samples or another objective.

    Args:
        model: A Hugging Face causal language model, or a view of one.
        optimizer: AdamW and its learning rate.
        teacher: Learn its distribution, too.
        seed: Seed of dropout.

    Attributes:
        view: The model's decoder layers and linears.
        trained: What is trained; None before ``TrainableParameters`` has decided.
        num_trained_tokens: Predicted tokens that were learned from so far.
    """

    def __init__(
        self,
        model: PreTrainedModel | DecoderView,
        optimizer: OptimizerConfig | None = None,
        *,
        teacher: Teacher | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.view = model if isinstance(model, DecoderView) else DecoderView(model)
        self.model = self.view.model
        self.trained: Trained | None = None
        self.num_trained_tokens = 0
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds a part; it is checked here instead
        self._optimizer_config = optimizer or OptimizerConfig()
        self._objective = Objective(self.model, teacher)
        self._seed = seed
        self._is_split = False
        self._validation = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

    def setup(self, stage: str) -> None:
        """Find out how packed rows are told apart, if there are any.

        Args:
            stage: ``fit`` or ``validate``.
        """
        del stage
        data = self._data()
        if data is not None and data.order == "packed":
            self._objective.expect_packed(data.row_length)

    def configure_model(self) -> None:
        """Split the model over processes where the strategy is FSDP2, before the optimizer."""
        if isinstance(self.trainer.strategy, CompensationFSDP) and not self._is_split:
            assert self.device_mesh is not None  # the strategy has made it
            shard_layers(self.view, self.device_mesh["data_parallel"])
            self._is_split = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the trainable parameters, with warm-up and decay by step."""
        config = self._optimizer_config
        optimizer = torch.optim.AdamW(
            (p for p in self.parameters() if p.requires_grad),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
        scheduler = get_scheduler(
            config.schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self._num_steps(),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def on_fit_start(self) -> None:
        """Turn dropout on; Lightning leaves modules in the mode that they are in."""
        self.model.train()

    def on_fit_end(self) -> None:
        """Turn dropout off."""
        self.model.train(False)

    def training_step(
        self, batch: StepBatch, batch_idx: int
    ) -> dict[str, Any]:  # Any: Lightning's own type
        """Take one optimizer step.

        Args:
            batch: The rows of this process in micro-batches, each with ``input_ids``, ``mask``,
                ``targets`` and ``position_ids``, ``(B, T)``.
            batch_idx: Number of the step.

        Returns:
            ``loss``: mean over the predicted tokens of all processes, in nats, and the step's
            ``learning_rate``.

        Raises:
            NumericsError: If the loss is NaN or infinite.
        """
        start = time.perf_counter()
        torch.manual_seed(_step_seed(self._seed, batch_idx, self.global_rank))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # there is one
        optimizer.zero_grad()
        num_tokens = max(batch.num_targets, 1)  # windows of single tokens predict nothing
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(batch.parts, start=1):
            with self._synchronized(number == len(batch.parts)):
                loss = self._run(part).sum() / num_tokens
                if not loss.isfinite():
                    raise NumericsError(
                        f"the training loss is {float(loss.detach())} in step {batch_idx}; lower "
                        "optimizer.learning_rate, or try model.dtype float32"
                    )
                # Strategies take the mean of gradients over processes, and a sum is meant.
                self.manual_backward(loss * self.trainer.world_size)
            total += loss.detach()
        total = processes.summed({"loss": total})["loss"]
        learning_rate = self._step(optimizer)
        self.num_trained_tokens += num_tokens
        speed = num_tokens / (time.perf_counter() - start)
        self.log_dict({"loss": total, "tokens_per_second": speed}, prog_bar=True)
        self.log("learning_rate", learning_rate)
        return {"loss": total, "learning_rate": learning_rate}

    def token_losses(self, part: MicroBatch) -> Tensor:
        """Return the loss that is learned from, of every predicted token, in nats, ``(n,)``."""
        return self._objective.losses(part)

    def _run(self, part: MicroBatch) -> Tensor:
        """Return the same by one forward pass of the strategy."""
        strategy = self.trainer.strategy
        if isinstance(strategy, CompensationDeepSpeed):
            return strategy.run_part("token_losses", part)
        return self.token_losses(part)

    def _synchronized(self, is_last: bool) -> AbstractContextManager[None]:
        """Return a block whose backward pass adds up gradients here, or over all processes."""
        strategy = self.trainer.strategy
        if is_last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def _step(self, optimizer: LightningOptimizer) -> float:
        """Clip gradients, change parameters, and return the learning rate that was used."""
        clip = self._optimizer_config.gradient_clip
        if clip is not None:
            self.clip_gradients(
                optimizer,  # type: ignore[arg-type]  # it wraps the optimizer that is meant
                gradient_clip_val=clip,
                gradient_clip_algorithm="norm",
            )
        optimizer.step()
        scheduler: Any = self.lr_schedulers()  # Any: Lightning's type allows lists and plateaus
        learning_rate = float(scheduler.get_last_lr()[0])
        scheduler.step()
        return learning_rate

    def on_validation_epoch_start(self) -> None:
        """Start a new mean."""
        self._validation.reset()

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add the cross-entropy of validation samples.

        Args:
            batch: One micro-batch.
            batch_idx: Its number.
        """
        del batch_idx
        self._validation.update(self._objective.cross_entropies(batch).double())

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all predicted tokens."""
        self.log(VALIDATION_LOSS, self.mean_validation_loss(), prog_bar=True)

    def mean_validation_loss(self) -> float:
        """Return the mean over all predicted tokens of validation steps so far.

        Returns:
            Nats per predicted token, of all processes.

        Raises:
            NumericsError: If it is NaN or infinite.
        """
        loss = float(self._validation.compute())
        if not math.isfinite(loss):
            raise NumericsError(
                f"the validation loss is {loss}; lower optimizer.learning_rate, or try "
                "model.dtype float32"
            )
        return loss

    @property
    def model_hashes(self) -> dict[str, str]:
        """Fingerprint of the ``model`` before training, and of the ``teacher``, if any."""
        return self._objective.model_hashes

    @property
    def is_trainable(self) -> bool:
        """Whether there are trainable parameters."""
        return bool(self._trainable())

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, whole in every process.

        Returns:
            Name -> parameter, detached; not copied where it is not split over processes.
        """
        return dict(self.iterate_trained())

    def iterate_trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what ``trained_state`` returns, one parameter at a time."""
        for name, parameter in self._trainable().items():
            yield name, whole_values(parameter)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Give the trainable parameters the values that ``trained_state`` returned.

        Args:
            state: Name -> values, for all of them.
        """
        for name, parameter in self._trainable().items():
            fill(parameter, state[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Leave in a checkpoint what is trained, and say what it belongs to.

        Args:
            checkpoint: Content of the checkpoint, changed in place.
        """
        trained = self._trainable()
        stored = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: stored[name] for name in stored if name in trained}
        checkpoint[_FINGERPRINT] = self._fingerprint()
        checkpoint[_NUM_TOKENS] = self.num_trained_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Refuse a checkpoint of another training.

        Args:
            checkpoint: Content of the checkpoint.

        Raises:
            ModelError: If it belongs to another model, other samples, or trains something else, or
                its tensors are of other shapes.
        """
        stored, own = checkpoint.get(_FINGERPRINT, {}), self._fingerprint()
        differing = sorted(key for key in own if stored.get(key) != own[key])
        if differing:
            raise ModelError(
                f"the checkpoint belongs to another training: it differs in {', '.join(differing)};"
                " start anew, or use what it was made with"
            )
        for name, value in self._trainable().items():
            if getattr(checkpoint["state_dict"].get(name), "shape", None) != whole_shape(value):
                raise ModelError(
                    f"{self.trainer.ckpt_path} is damaged: it has no {name} of shape "
                    f"{whole_shape(value)}; delete it to train again from the start"
                )
        self.num_trained_tokens = checkpoint[_NUM_TOKENS]

    def _fingerprint(self) -> dict[str, str]:
        data = self._data()
        shapes = {name: whole_shape(value) for name, value in self._trainable().items()}
        return {
            "model": self.model_hashes["model"],
            "trained parameters": hashlib.sha256(str(shapes).encode()).hexdigest(),
            "samples": str(None if data is None else data.fingerprint),
            "teacher": self._objective.teacher,
        }

    def _num_steps(self) -> int:
        data = self._data()
        # Not the Trainer's own estimate: it would make the loader before the checkpoint is read,
        # and Lightning gives a loader its position only when it is made after that.
        return int(self.trainer.estimated_stepping_batches) if data is None else len(data.steps())

    def _data(self) -> TrainingData | None:
        # Lightning adds the attribute when fit is called with a data module, and declares no type.
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TrainingData) else None


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
