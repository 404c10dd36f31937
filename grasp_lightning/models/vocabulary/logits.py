"""Compares the logits of a model before and after its vocabulary was trimmed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError

_TOLERANCE = 1e-5  # as a share of the largest logit; no less than the type can tell apart


class Difference(NamedTuple):
    """Largest absolute difference of logits, and largest absolute value."""

    difference: float
    largest: float


def kept_logits(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], old_ids: Sequence[int], kept: Tensor
) -> list[Tensor]:
    """Return the logits of the tokens that stay, after each token of some texts.

    Args:
        texts: Old ids; of these, the tokens that do not stay are left out.
        old_ids: Old id of each id that the model has now.
        kept: Old ids of the tokens that stay, ``(n,)``.

    Returns:
        Float32 logits on the CPU, ``(T, n)`` for each text.
    """
    ids = {old: new for new, old in enumerate(old_ids)}
    stay = set(kept.tolist())
    columns = torch.tensor([ids[old] for old in kept.tolist()])
    found = []
    for text in texts:
        known = [ids[old] for old in text if old in stay]
        given = torch.tensor([known or [ids[int(kept[0])]]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=given, use_cache=False).logits[0]
        found.append(logits.float().cpu()[:, columns])
    return found


def compare_logits(
    before: Sequence[Tensor], after: Sequence[Tensor], dtype: torch.dtype
) -> Difference:
    """Return how far logits differ; ``dtype`` is the type in which they were computed.

    Raises:
        ModelError: If they are not equal.
    """
    pairs = list(zip(before, after, strict=True))
    largest = max(float(old.abs().max()) for old, _ in pairs)
    difference = max(float((old - new).abs().max()) for old, new in pairs)
    if not difference <= max(_TOLERANCE, torch.finfo(dtype).eps) * max(largest, 1.0):
        raise ModelError(
            f"the logits of the trimmed model differ by {difference:.2g}, so something else in it "
            "depends on token ids; it cannot be trimmed"
        )
    return Difference(difference, largest)
