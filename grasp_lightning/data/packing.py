"""Calls a model on packed rows so that the samples of a row stay separate.

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
"""How a model learns where the samples of a packed row begin."""

_LEAST_ROW = 8  # tokens; the samples of the trial below must fit
# A full row, which reveals a missing sliding window, and a mixed row.
_TRIAL: Rows = [[0], [1, 2, 3]]
# Maximum difference between the logits of a sample in a packed row and alone, relative to their
# norm, averaged over its tokens (a router that picks another expert changes a single token).
# SmolLM2-135M: 2e-6 from rounding in float32, 0.03 in bfloat16; 0.5 if samples see each other.
_TOLERANCE = {torch.float32: 0.02, torch.float64: 0.02}
_LOW_PRECISION_TOLERANCE = 0.2


def packed_inputs(
    batch: Mapping[str, Tensor], form: PackingForm, dtype: torch.dtype
) -> dict[str, Tensor | Literal[False]]:
    """Return the keyword arguments for a model call on packed rows.

    Args:
        batch: ``input_ids`` and ``position_ids``, both ``(B, T)``.
        dtype: Floating point type of the model.

    Returns:
        Ids, positions, and no cache; for ``mask`` also a bias for the attention scores,
        ``(B, 1, T, T)``: 0 for preceding tokens of the same sample, otherwise the lowest number.
    """
    inputs: dict[str, Tensor | Literal[False]] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        # With a cache, transformers treats positions that restart as one sample.
        "use_cache": False,
    }
    if form == "mask":
        # Padding counts as samples of one token, so that every token has one to attend to.
        sample = (batch["position_ids"] == 0).cumsum(dim=1)
        is_seen = (sample[:, :, None] == sample[:, None, :]).tril()  # (B, T, T)
        mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
        inputs["attention_mask"] = mask.masked_fill_(~is_seen, torch.finfo(dtype).min)[:, None]
    return inputs


def packing_form(model: PreTrainedModel, row_length: int) -> PackingForm:
    """Return how a model keeps the samples of a packed row separate, found by trial.

    Most families need only positions that restart, which also keep sliding windows; others need a
    mask. Two rows of random tokens must give the same logits as their samples give alone.

    Args:
        model: The unwrapped model; it is left unchanged.
        row_length: Tokens per row, at least 8.

    Raises:
        ModelError: If neither form works.
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
        f"{model.config._attn_implementation}: samples in a shared row do not get the same logits "
        "as alone; use length_grouped or shuffled batches"
    )


def _random_samples(model: PreTrainedModel, row_length: int) -> TokenSamples:
    """Return samples for ``_TRIAL``; the second row ends with one padding token."""
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
    # Model families refuse an unknown argument, or its shape, in different ways.
    except (TypeError, ValueError, IndexError, RuntimeError):
        return False
    difference = (packed[batch["mask"]] - alone).norm(dim=-1)
    relative = (difference / alone.norm(dim=-1)).split(samples.lengths.tolist())
    tolerance = _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)
    return all(float(part.mean()) <= tolerance for part in relative)


def _batch(model: PreTrainedModel, samples: TokenSamples, rows: Rows) -> dict[str, Tensor]:
    return {name: part.to(model.device) for name, part in collate(samples, rows).items()}


def _logits(model: PreTrainedModel, inputs: Mapping[str, Tensor | Literal[False]]) -> Tensor:
    """Return float32 logits minus their mean over the vocabulary, which carries no information."""
    logits: Tensor = model(**inputs).logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)
