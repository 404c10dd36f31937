"""The LightningModule of calibration: the model runs forward and backward, nothing is trained."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.config import FisherChoice
from grasp_lightning.errors import NumericsError
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice
from grasp_lightning.models.calls import find_non_finite
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.models.next_token import fisher_losses, forward_inputs, next_token_losses
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Removable, Statistics, Step
from grasp_lightning.training.hidden_cache import HiddenCache
from grasp_lightning.training.removal_losses import summed_losses_without

Batch = Mapping[str, Tensor]


class CalibrationModule(L.LightningModule):
    """Runs a causal language model over calibration windows while callbacks collect statistics.

    There is no optimizer. During a Trainer run the model is in eval mode with all parameters
    frozen; a backward pass happens only where a callback makes hidden states require grad.

    Args:
        fisher: Gradients of a backward pass: those of the text's labels (``empirical``), or random
            ones with the covariance of the predictions (``sampled``).
        removables: Parts without which a predict computes the loss, one at a time.

    Attributes:
        measured: The steps measured in this run so far, for later callbacks.
        layer_choice: How layers are chosen from the measurements; None until a callback sets it.
        cache: Hidden states kept between passes; None keeps none.
        plan: The plan that ``ReplaceRedundantLayers`` applied; None before.
    """

    def __init__(
        self,
        model: PreTrainedModel | DecoderView,
        *,
        fisher: FisherChoice = "empirical",
        removables: Sequence[Removable] = (),
    ) -> None:
        super().__init__()
        self.view = model if isinstance(model, DecoderView) else DecoderView(model)
        self.model = self.view.model
        self.measured: list[tuple[Step, Statistics]] = []
        self.layer_choice: LayerChoice | None = None
        self.cache: HiddenCache | None = None
        self.plan: Plan | None = None
        self.fisher: FisherChoice = fisher
        self.removables = tuple(removables)
        self.automatic_optimization = False
        self._frozen = ExitStack()

    @property
    def selected_layers(self) -> tuple[int, ...] | None:
        """The chosen layers; None until both the choice and its statistics exist."""
        stats = [stats for step, stats in self.measured if step.name == SELECT]
        if self.layer_choice is None or not stats:
            return None
        return self.layer_choice.chosen(stats[-1])

    def configure_optimizers(self) -> None:
        """Return no optimizer: calibration trains nothing."""

    def configure_model(self) -> None:
        """Do nothing: a sharded model was already sharded when it was loaded."""

    def setup(self, stage: str) -> None:
        """Freeze the model before a Trainer run."""
        del stage
        self._frozen.close()
        self._frozen.enter_context(frozen(self.model))
        self.measured.clear()

    def teardown(self, stage: str) -> None:
        """Restore the model's modes and ``requires_grad`` flags."""
        del stage
        self._frozen.close()

    def configure_callbacks(self) -> list[L.Callback]:
        """Return a callback that tears down after a failed run, where Lightning does not."""
        return [_TearDownOnException()]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one batch forward, and backward if the loss requires grad.

        The loss is the cross-entropy summed over predicted tokens, so gradients do not depend on
        which windows share a batch. Sampled gradients are seeded by window for the same reason.

        Args:
            batch: ``input_ids``, ``mask`` and ``targets``, each ``(B, T)``, and ``index``, which is
                empty for padding: it runs because other processes may need this one's weights.
        """
        if self.cache is not None:
            self.cache.start_batch(batch["index"])
        logits = self.model(**forward_inputs(batch), use_cache=False).logits
        losses = calibration_losses(self.fisher, logits, batch)
        loss = losses.sum()
        check_loss(self.view, batch, batch_idx, loss)
        if len(losses) > 0:  # padding has no target
            self.log("calibration_loss", losses.detach().mean(), batch_size=len(batch["index"]))
        if loss.requires_grad:
            self.manual_backward(loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Run the decoder layers forward, without the language-model head.

        Returns:
            Loss of the batch without each of the ``removables``, in nats summed over its predicted
            tokens, float64; None if there are none.
        """
        del batch_idx
        if self.cache is not None:
            self.cache.start_batch(batch["index"])
        if self.removables:
            return summed_losses_without(self.view, self.removables, batch)
        self.model.base_model(**forward_inputs(batch), use_cache=False)
        return None


def calibration_losses(fisher: FisherChoice, logits: Tensor, batch: Batch) -> Tensor:
    """Return the loss of every predicted token in nats, ``(n,)``, with the gradients of ``fisher``.

    Sampled gradients are seeded by window.

    Args:
        fisher: As in ``CalibrationModule``.
        logits: Scores of the next token, ``(B, T, V)``.
        batch: As in ``CalibrationModule.training_step``.
    """
    predicted = batch["input_ids"], batch["targets"]
    if fisher == "empirical":
        return next_token_losses(logits, *predicted)
    return fisher_losses(logits, *predicted, seeds=batch["index"].tolist())


def check_loss(view: DecoderView, batch: Batch, number: int, loss: Tensor) -> None:
    """Raise a ``NumericsError`` if a batch, of a given number, has a loss that is not finite."""
    where = find_non_finite(view, forward_inputs(batch), loss)
    if where is not None:
        raise NumericsError(
            f"the calibration loss is NaN or infinite in batch {number}, first in {where}; "
            f"{nan_advice(view.model.dtype)}"
        )


class _TearDownOnException(L.Callback):
    """Tears the module down after an exception."""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tear down."""
        del trainer, exception
        pl_module.teardown("exception")
