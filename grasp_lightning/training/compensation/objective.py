"""Training losses: cross-entropy on the text, or distillation from a teacher."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.data.batching import MicroBatch
from grasp_lightning.data.packing import PackingForm, packed_inputs, packing_form
from grasp_lightning.models.integrity import model_hash
from grasp_lightning.models.next_token import (
    PREDICTION_KEYS,
    TopPredictions,
    distillation_losses,
    forward_inputs,
    next_token_losses,
    on_device,
    top_k_distillation_losses,
)
from grasp_lightning.training.compensation.prediction import refuse_non_finite


class Teacher(NamedTuple):
    """A dense model to distill from.

    Attributes:
        temperature: Applied to both distributions.
        mix: The teacher's share of the loss.
    """

    model: PreTrainedModel
    temperature: float
    mix: float


class CachedTeacher(NamedTuple):
    """A dense model whose predictions come with the batches, as ``TopPredictions``.

    Attributes:
        digest: Hash of the model, and of what its predictions depend on.
        temperature: Applied to both distributions.
        mix: The teacher's share of the loss.
    """

    digest: str
    temperature: float
    mix: float


class Objective:
    """Losses of the trained model; not a module, so that a teacher is not moved, saved or wrapped.

    Attributes:
        model_hashes: Fingerprints of the ``model`` before training and of any ``teacher``.
    """

    def __init__(self, model: PreTrainedModel, teacher: Teacher | CachedTeacher | None) -> None:
        self._model = model
        self._teacher = teacher
        self._forms: dict[PreTrainedModel, PackingForm] = {}
        self.model_hashes = {"model": model_hash(model)}
        if isinstance(teacher, Teacher):
            self.model_hashes["teacher"] = model_hash(teacher.model)
        elif teacher is not None:
            self.model_hashes["teacher"] = teacher.digest

    @property
    def teacher(self) -> str:
        """Fingerprint of the teacher and its settings; ``None`` without a teacher."""
        return str(self._teacher and (self.model_hashes["teacher"], *self._teacher[1:]))

    def expect_packed(self, row_length: int) -> None:
        """Find out how each model separates the samples of a packed row of this many tokens."""
        models = [self._model]
        if isinstance(self._teacher, Teacher):
            models.append(self._teacher.model)
        for model in models:
            self._forms[model] = packing_form(model, row_length)

    def losses(self, batch: MicroBatch) -> Tensor:
        """Return the training loss of every predicted token, in nats, ``(n,)``."""
        if self._teacher is None:
            return self.cross_entropies(batch)
        _, temperature, mix = self._teacher
        ids, targets = batch["input_ids"], batch["targets"]
        if isinstance(self._teacher, CachedTeacher):
            logits = self._logits(self._model, batch)
            predicted = TopPredictions(*(batch[key].to(logits.device) for key in PREDICTION_KEYS))
            return top_k_distillation_losses(
                logits, predicted, ids, targets, temperature=temperature, mix=mix
            )
        with torch.inference_mode():
            given = self._logits(self._teacher.model, batch)
        logits = self._logits(self._model, batch)
        given = given.to(logits.device)
        return distillation_losses(logits, given, ids, targets, temperature=temperature, mix=mix)

    def check_teacher(self, batch: MicroBatch) -> None:
        """Raise a ``NumericsError`` if the teacher gives NaN or infinity for a batch."""
        if isinstance(self._teacher, Teacher):
            with torch.inference_mode():
                logits = self._logits(self._teacher.model, batch)
            if not logits[batch["mask"].to(logits.device)].isfinite().all():
                refuse_non_finite(self._teacher.model, batch)

    def cross_entropies(self, batch: MicroBatch) -> Tensor:
        """Return the cross-entropy of every predicted token, in nats, ``(n,)``."""
        logits = self._logits(self._model, batch)
        return next_token_losses(logits, batch["input_ids"], batch["targets"])

    def _logits(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        form = self._forms.get(model)
        inputs: dict[str, Any]  # Any: keyword arguments of a model
        if form is None:
            inputs = {**forward_inputs(on_device(batch, model.device)), "use_cache": False}
        else:
            moved = {name: part.to(model.device) for name, part in batch.items()}
            inputs = dict(packed_inputs(moved, form, model.dtype))
        logits: Tensor = model(**inputs).logits
        return logits
