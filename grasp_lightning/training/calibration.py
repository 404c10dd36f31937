"""The LightningModule of calibration: the model runs forward and backward, nothing is trained."""

from collections.abc import Mapping
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
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.hidden_cache import HiddenCache

Batch = Mapping[str, Tensor]


class CalibrationModule(L.LightningModule):
    """Runs a causal language model over calibration windows; callbacks read what passes by.

    There is no optimizer. While a Trainer runs, the model is in eval mode and all its parameters
    are frozen; a backward pass happens where a callback has made hidden states require grad.

    Args:
        model: A Hugging Face causal language model, or a view of one.
        fisher: Whose gradients a backward pass carries: those of the text's labels (``empirical``),
            or random ones with the covariance of the predictions (``sampled``).

    Attributes:
        view: The model's decoder layers and linears.
        measured: Steps measured so far in this run, for callbacks that come later.
        layer_choice: How ``LayerSimilarity`` or explicit layers choose; None before.
        cache: Hidden states kept between passes; None keeps none.
        plan: The plan that ``ReplaceRedundantLayers`` has applied; None before.
        fisher: Whose gradients a backward pass carries.
    """

    def __init__(
        self, model: PreTrainedModel | DecoderView, *, fisher: FisherChoice = "empirical"
    ) -> None:
        super().__init__()
        self.view = model if isinstance(model, DecoderView) else DecoderView(model)
        self.model = self.view.model
        self.measured: list[tuple[Step, Statistics]] = []
        self.layer_choice: LayerChoice | None = None
        self.cache: HiddenCache | None = None
        self.plan: Plan | None = None
        self.fisher: FisherChoice = fisher
        self.automatic_optimization = False
        self._frozen = ExitStack()

    @property
    def selected_layers(self) -> tuple[int, ...] | None:
        """Layers that follow from the choice and what was measured; None before both are there."""
        stats = [stats for step, stats in self.measured if step.name == SELECT]
        if self.layer_choice is None or not stats:
            return None
        return self.layer_choice.chosen(stats[-1])

    def configure_optimizers(self) -> None:
        """Return no optimizer: calibration changes no parameter."""

    def configure_model(self) -> None:
        """Leave the model as it is: it was sharded where it was loaded, or is whole."""

    def setup(self, stage: str) -> None:
        """Freeze the model before a Trainer starts.

        Args:
            stage: ``fit`` or ``predict``.
        """
        del stage
        self._frozen.close()
        self._frozen.enter_context(frozen(self.model))
        self.measured.clear()

    def teardown(self, stage: str) -> None:
        """Give the model back as it was.

        Args:
            stage: ``fit`` or ``predict``.
        """
        del stage
        self._frozen.close()

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callback that gives the model back as it was when a run ends early.

        Returns:
            One callback: Lightning calls ``teardown`` only after a run that ended well.
        """
        return [_TearDownOnException()]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one batch forward, and backward if anything below the loss requires grad.

        The loss is the cross-entropy summed over predicted tokens, so that gradients do not depend
        on which windows share a batch; nor do random ones, whose seed is the window's number.

        Args:
            batch: ``input_ids``, ``mask`` and ``targets``, each ``(B, T)``, and ``index``, empty
                for padding, which runs since other processes may need this one's weights.
            batch_idx: Number of the batch.

        Raises:
            NumericsError: If the loss is NaN or infinite, naming the first decoder layer whose
                output is.
        """
        if self.cache is not None:
            self.cache.start_batch(batch["index"])
        logits = self.model(**forward_inputs(batch), use_cache=False).logits
        predicted = batch["input_ids"], batch["targets"]
        if self.fisher == "empirical":
            losses = next_token_losses(logits, *predicted)
        else:
            losses = fisher_losses(logits, *predicted, seeds=batch["index"].tolist())
        loss = losses.sum()
        where = find_non_finite(self.view, forward_inputs(batch), loss)
        if where is not None:
            raise NumericsError(
                f"the calibration loss is NaN or infinite in batch {batch_idx}, first in {where}; "
                f"{nan_advice(self.model.dtype)}"
            )
        if len(losses) > 0:  # padding has no target
            self.log("calibration_loss", losses.detach().mean(), batch_size=len(batch["index"]))
        if loss.requires_grad:
            self.manual_backward(loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the decoder layers alone forward; the language-model head is not needed.

        Args:
            batch: ``input_ids`` and ``mask``, each ``(B, T)``.
            batch_idx: Number of the batch.
        """
        del batch_idx
        self.model.base_model(**forward_inputs(batch), use_cache=False)


class _TearDownOnException(L.Callback):
    """Tears a module down that an exception has left set up."""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tear down."""
        del trainer, exception
        pl_module.teardown("exception")
