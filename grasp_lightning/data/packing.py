"""How a model is called on packed rows, so that it keeps the samples of a row apart.

Legend: B rows of T tokens in a batch.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.data.batching import Rows, TokenSamples, collate
from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import frozen
from grasp_lightning.models.next_token import forward_inputs

PackingForm = Literal["positions", "mask"]
"""How a model is told where a packed row changes from one sample to the next."""

_LEAST_ROW = 8  # tokens in which the samples of the trial below fit
_TRIAL: Rows = [[0], [1, 2, 3]]  # a full row, so that a lost sliding window shows, and a mixed one
# Most that the logits of a sample may differ between a packed row and the sample alone, relative to
# their norm, on average over its tokens (a router that chooses another expert changes a single
# token). SmolLM2-135M differs by 2e-6 from rounding in float32 and by 0.03 in bfloat16, and by 0.5
# where samples attend to each other.
_TOLERANCE = {torch.float32: 0.02, torch.float64: 0.02}
_LOW_PRECISION_TOLERANCE = 0.2


def packed_inputs(
    batch: Mapping[str, Tensor], form: PackingForm, dtype: torch.dtype
) -> dict[str, Tensor | Literal[False]]:
    """Return the keyword arguments with which a model is called on packed rows.

    Args:
        batch: ``input_ids`` and ``position_ids``, both ``(B, T)``.
        form: What ``packing_form`` found for the model.
        dtype: Floating point type of the model.

    Returns:
        Ids, positions, and no cache; for ``mask`` also the number that is added to the attention
        scores, ``(B, 1, T, T)``: 0 for earlier tokens of the same sample, else the lowest one.
    """
    inputs: dict[str, Tensor | Literal[False]] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        # With a cache, transformers takes positions that start again for one sample.
        "use_cache": False,
    }
    if form == "mask":
        # Padding counts as samples of one token, so that no token is without one to attend to.
        sample = (batch["position_ids"] == 0).cumsum(dim=1)
        is_seen = (sample[:, :, None] == sample[:, None, :]).tril()  # (B, T, T)
        mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
        inputs["attention_mask"] = mask.masked_fill_(~is_seen, torch.finfo(dtype).min)[:, None]
    return inputs


def packing_form(model: PreTrainedModel, row_length: int) -> PackingForm:
    """Find out how a model keeps the samples of a packed row apart, by trying.

    Positions that start again are enough for most families, and keep sliding windows; others need
    a mask. Two rows of random tokens must give the logits that their samples give alone.

    Args:
        model: The model, not wrapped; it is left as it was.
        row_length: Tokens of a row, at least 8.

    Returns:
        The first form that is right.

    Raises:
        ModelError: If neither is.
        ValueError: If the row is too short for several samples.
    """
    if row_length < _LEAST_ROW:
        raise ValueError(f"row_length must be at least {_LEAST_ROW}, got {row_length}")
    samples = _random_samples(model, row_length)
    forms: tuple[PackingForm, ...] = ("positions", "mask")
    with frozen(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        alone = torch.cat(
            [
                _logits(model, forward_inputs(_batch(model, samples, [[index]])))
                for index in range(len(samples))
            ],
            dim=1,
        )
        for form in forms:
            if _is_equal(model, samples, form, alone[0]):
                return form
    raise ModelError(
        f"packing does not work with {model.config.model_type} models and attention "
        f"{model.config._attn_implementation}: samples that share a row do not get the logits that "
        "they get alone; choose length_grouped or shuffled batches"
    )


def _random_samples(model: PreTrainedModel, row_length: int) -> TokenSamples:
    """Return samples for ``_TRIAL``; one token of its second row is padding."""
    half, quarter = row_length // 2, row_length // 4
    lengths = [row_length, half, quarter, row_length - half - quarter - 1]
    generator = torch.Generator().manual_seed(0)
    # From the configuration: a weight may be spread over several devices.
    size: int = model.config.get_text_config().vocab_size
    ids = [torch.randint(size, (length,), generator=generator) for length in lengths]
    return TokenSamples.from_rows(ids, [torch.zeros(n, dtype=torch.bool) for n in lengths])


def _is_equal(
    model: PreTrainedModel, samples: TokenSamples, form: PackingForm, alone: Tensor
) -> bool:
    """Return whether the rows of ``_TRIAL`` give the logits of their samples alone, (n, V)."""
    batch = _batch(model, samples, _TRIAL)
    try:
        packed = _logits(model, packed_inputs(batch, form, model.dtype))
    except torch.OutOfMemoryError:
        raise
    # Families refuse an argument that they do not know, or its shape, each in its own way.
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False
    difference = (packed[batch["mask"]] - alone).norm(dim=-1)
    relative = (difference / alone.norm(dim=-1)).split(samples.lengths.tolist())
    tolerance = _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)
    return all(float(part.mean()) <= tolerance for part in relative)


def _batch(model: PreTrainedModel, samples: TokenSamples, rows: Rows) -> dict[str, Tensor]:
    return {name: part.to(model.device) for name, part in collate(samples, rows).items()}


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor | Literal[False]]) -> Tensor:
    """Return float32 logits without their mean over the vocabulary, which says nothing."""
    logits: Tensor = model(**inputs).logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)
