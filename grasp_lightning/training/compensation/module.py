"""The LightningModule that trains a compressed model."""

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
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.config import OptimizerConfig
from grasp_lightning.data.batching import MicroBatch
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.steps import StepBatch
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.training.checkpoints import check_checkpoint
from grasp_lightning.training.compensation.adapters import Trained
from grasp_lightning.training.compensation.objective import (
    CachedTeacher,
    Objective,
    Teacher,
)
from grasp_lightning.training.compensation.optimizer import make_optimizer, rate_share
from grasp_lightning.training.shards import fill, whole_shape, whole_values
from grasp_lightning.training.strategies import (
    CompensationDeepSpeed,
    CompensationFSDP,
    shard_layers,
)

VALIDATION_LOSS = "validation_loss"
_LOWER = "lower optimizer.learning_rate"
_FINGERPRINT, _NUM_TOKENS = "grasp_lightning_fingerprint", "grasp_lightning_trained_tokens"


class CompensationModule(L.LightningModule):
    """Trains the parameters of a causal language model that a callback made trainable.

    A batch holds the micro-batches of one optimizer step. The loss is the mean over the step's
    predicted tokens, so it does not depend on how rows are split into micro-batches. ``seed`` and
    the step seed dropout, so a resumed run drops the same units.

    A checkpoint holds the trained parameters only, never the rest of the model. A module with
    another model, other samples or another objective refuses it.

    Args:
        model: The compressed model.
        optimizer: AdamW and its learning rate.
        teacher: A dense model to learn from.
        seed: Seed of dropout.
        is_limited: Whether a ``TimeLimit`` plans the steps, and with them the schedule.

    Attributes:
        trained: None until ``TrainableParameters`` has set it.
        num_trained_tokens: Predicted tokens trained on so far.
        planned_steps: Number of steps that a ``TimeLimit`` has planned; None before.
        measures_text: Whether validation steps take the cross-entropy, as perplexity needs it,
            instead of the training loss.
    """

    def __init__(
        self,
        model: PreTrainedModel | DecoderView,
        optimizer: OptimizerConfig | None = None,
        *,
        teacher: Teacher | CachedTeacher | None = None,
        seed: int = 0,
        is_limited: bool = False,
    ) -> None:
        super().__init__()
        self.view = model if isinstance(model, DecoderView) else DecoderView(model)
        self.model = self.view.model
        self.trained: Trained | None = None
        self.num_trained_tokens = 0
        self.planned_steps: int | None = None
        self.measures_text = False
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints are partial, and checked here
        self._optimizer_config = optimizer or OptimizerConfig()
        self._objective = Objective(self.model, teacher)
        self._seed = seed
        self._is_limited = is_limited
        self._is_split = False
        self._validation = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

    def setup(self, stage: str) -> None:
        """Find out how the models separate packed samples, if rows are packed."""
        del stage
        data = self._data()
        if data is not None and data.order == "packed":
            self._objective.expect_packed(data.row_length)

    def configure_model(self) -> None:
        """Shard the model under FSDP2, before the optimizer exists."""
        if isinstance(self.trainer.strategy, CompensationFSDP) and not self._is_split:
            assert self.device_mesh is not None  # the strategy has made it
            shard_layers(self.view, self.device_mesh["data_parallel"])
            self._is_split = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the trainable parameters, with a schedule by step."""
        config, num_steps = self._optimizer_config, self._num_steps()
        is_sharded = isinstance(self.trainer.strategy, CompensationFSDP | CompensationDeepSpeed)
        optimizer = make_optimizer(config, self._trainable().values(), is_sharded=is_sharded)

        def share(step: int) -> float:
            if self._is_limited:
                return rate_share(config, step, self.planned_steps, is_limited=True)
            return rate_share(config, step, num_steps)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share)}}

    def on_fit_start(self) -> None:
        """Turn dropout on; Lightning keeps each module's mode."""
        self.model.train()

    def on_fit_end(self) -> None:
        """Turn dropout off."""
        self.model.train(False)

    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, Tensor | float]:
        """Take one optimizer step.

        Args:
            batch: This process's rows in micro-batches, each with ``input_ids``, ``mask``,
                ``targets`` and ``position_ids``, ``(B, T)``.

        Returns:
            ``loss``, the mean over the predicted tokens of all processes in nats,
            ``learning_rate`` and ``tokens_per_second``.

        Raises:
            NumericsError: If the loss is NaN or infinite.
        """
        start = time.perf_counter()
        torch.manual_seed(_step_seed(self._seed, batch_idx, self.global_rank))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # there is one
        optimizer.zero_grad()
        num_tokens = max(batch.num_targets, 1)  # windows of one token predict nothing
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(batch.parts, start=1):
            with self._synchronized(number == len(batch.parts)):
                loss = self._run(part).sum() / num_tokens
                # Strategies average gradients over processes; this makes it a sum.
                self.manual_backward(loss * self.trainer.world_size)
            total += loss.detach()
        total = processes.summed({"loss": total})["loss"]
        if not total.isfinite():
            for part in batch.parts:
                self._objective.check_teacher(part)
            raise NumericsError(
                f"the training loss is {float(total)} in step {batch_idx}; "
                f"{nan_advice(self.model.dtype, _LOWER)}"
            )
        learning_rate = self._step(optimizer)
        self.num_trained_tokens += num_tokens
        speed = num_tokens / (time.perf_counter() - start)
        self.log_dict({"loss": total, "tokens_per_second": speed}, prog_bar=True)
        self.log("learning_rate", learning_rate)
        return {"loss": total, "learning_rate": learning_rate, "tokens_per_second": speed}

    def token_losses(self, part: MicroBatch) -> Tensor:
        """Return the training loss of every predicted token, in nats, ``(n,)``."""
        return self._objective.losses(part)

    def _run(self, part: MicroBatch) -> Tensor:
        """Return ``token_losses`` from one forward pass of the strategy."""
        strategy = self.trainer.strategy
        if isinstance(strategy, CompensationDeepSpeed):
            return strategy.run_part("token_losses", part)
        return self.token_losses(part)

    def _synchronized(self, is_last: bool) -> AbstractContextManager[None]:
        """Return a block whose backward pass reduces gradients over processes only if last."""
        strategy = self.trainer.strategy
        if is_last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def _step(self, optimizer: LightningOptimizer) -> float:
        """Clip gradients, step, and return the learning rate that was used."""
        clip = self._optimizer_config.gradient_clip
        if clip is not None:
            self.clip_gradients(
                optimizer,  # type: ignore[arg-type]  # a wrapper
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
        """Add the losses of one micro-batch."""
        del batch_idx
        if self.measures_text:
            losses = self._objective.cross_entropies(batch)
        else:
            losses = self._objective.losses(batch)
        if not losses.isfinite().all():
            self._objective.check_teacher(batch)
        self._validation.update(losses.double())

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all predicted tokens."""
        self.log(VALIDATION_LOSS, self.mean_validation_loss(), prog_bar=True)

    def mean_validation_loss(self) -> float:
        """Return the mean validation loss so far over all processes, in nats per predicted token.

        Raises:
            NumericsError: If it is NaN or infinite.
        """
        loss = float(self._validation.compute())
        if not math.isfinite(loss):
            advice = nan_advice(self.model.dtype, _LOWER)
            raise NumericsError(f"the validation loss is {loss}; {advice}")
        return loss

    @property
    def model_hashes(self) -> dict[str, str]:
        """Fingerprints of the ``model`` before training and of any ``teacher``."""
        return self._objective.model_hashes

    @property
    def is_trainable(self) -> bool:
        """Whether there are trainable parameters."""
        return bool(self._trainable())

    def trained_state(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, detached and whole in every process.

        Parameters that are not sharded are not copied.
        """
        return dict(self.iterate_trained())

    def iterate_trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the items of ``trained_state``, gathering one parameter at a time."""
        for name, parameter in self._trainable().items():
            yield name, whole_values(parameter)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the values that ``trained_state`` returned into the trainable parameters."""
        for name, parameter in self._trainable().items():
            fill(parameter, state[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Keep only trained parameters in the checkpoint, and add what identifies this training."""
        trained = self._trainable()
        stored = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: stored[name] for name in stored if name in trained}
        checkpoint[_FINGERPRINT] = self._fingerprint()
        checkpoint[_NUM_TOKENS] = self.num_trained_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Take the counter; another training is refused, see ``check_checkpoint``."""
        shapes = {name: whole_shape(value) for name, value in self._trainable().items()}
        stored = checkpoint.get(_FINGERPRINT, {})
        check_checkpoint(checkpoint, stored, self._fingerprint(), shapes, self.trainer.ckpt_path)
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
        # The Trainer's own estimate would create the loader before the checkpoint is read, and
        # Lightning restores the position only of a loader created afterwards.
        return int(self.trainer.estimated_stepping_batches) if data is None else len(data.steps())

    def _data(self) -> TrainingData | None:
        # Lightning sets the undeclared attribute when fit gets a data module.
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, TrainingData) else None


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
