"""A teacher's predictions for whole samples, to be kept."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from grasp_lightning.config.common import Precision
from grasp_lightning.data.batching import TokenSamples, collate
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.calls import locate_non_finite
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.models.next_token import (
    TopPredictions,
    forward_inputs,
    top_predictions,
)


@torch.inference_mode()
def predictions_of(
    teacher: PreTrainedModel,
    samples: TokenSamples,
    indices: Sequence[int],
    *,
    batch_size: int,
    top_k: int,
    temperature: float,
    precision: Precision,
) -> TopPredictions:
    """Return the predictions for all predicted tokens of some samples, in their order.

    Every sample is read alone, as in all orders of a training; similar lengths share a batch. NaN
    or infinity is a ``NumericsError``.

    Args:
        indices: At least one.
        batch_size: Samples per forward pass.
        precision: As of the training.
    """
    counts = samples.num_targets_of
    found: dict[int, TopPredictions] = {}
    by_length = sorted(indices, key=lambda index: int(samples.lengths[index]))
    for start in range(0, len(by_length), batch_size):
        batch_of = by_length[start : start + batch_size]
        batch = collate(samples, [[index] for index in batch_of])
        batch = {name: part.to(teacher.device) for name, part in batch.items()}
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = teacher(**forward_inputs(batch), use_cache=False).logits
        top = top_predictions(
            logits, batch["input_ids"], batch["targets"], top_k=top_k, temperature=temperature
        )
        if top.log_probs.isnan().any() or top.tail.isnan().any():
            refuse_non_finite(teacher, batch)
        sizes = counts[batch_of].tolist()
        parts = [torch.split(values.cpu(), sizes) for values in top]
        for index, *values in zip(batch_of, *parts, strict=True):
            found[index] = TopPredictions(*values)
    columns = zip(*(found[index] for index in indices), strict=True)
    return TopPredictions(*(torch.cat(column) for column in columns))


def refuse_non_finite(teacher: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Raise the ``NumericsError`` that says where a teacher first gives NaN or infinity."""
    inputs = {name: part.to(teacher.device) for name, part in forward_inputs(batch).items()}
    where = locate_non_finite(DecoderView(teacher), inputs)
    raise NumericsError(
        f"distillation.teacher: the teacher gives NaN or infinity, first in {where}; "
        f"{nan_advice(teacher.dtype)}"
    )
