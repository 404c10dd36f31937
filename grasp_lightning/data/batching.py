"""Token samples of unequal length, and the batches of an epoch: padded, grouped or packed.

Legend: N samples of n tokens in all, B rows of T tokens in a batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.config import BatchOrder
from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import frozen
from grasp_lightning.models.next_token import forward_inputs

Rows = list[list[int]]
"""The rows of one batch: the indices of the samples that stand in each, one after another."""

MicroBatch = dict[str, Tensor]
"""``input_ids``, ``mask``, ``targets`` and ``position_ids``, each ``(B, T)``; see ``collate``."""

PackingForm = Literal["positions", "mask"]
"""How a model is told where a packed row changes from one sample to the next."""

_GROUP_BATCHES = 50  # samples of so many batches are sorted by length together
_IGNORED_ID = 0  # fills up rows: masked, and after all real tokens, so any id will do

_LEAST_ROW = 8  # tokens in which the samples of the trial below fit
_TRIAL: Rows = [[0], [1, 2, 3]]  # a full row, so that a lost sliding window shows, and a mixed one
# Most that the logits of a sample may differ between a packed row and the sample alone, relative to
# their norm, on average over its tokens (a router that chooses another expert changes a single
# token). SmolLM2-135M differs by 2e-6 from rounding in float32 and by 0.03 in bfloat16, and by 0.5
# where samples attend to each other.
_TOLERANCE = {torch.float32: 0.02, torch.float64: 0.02}
_LOW_PRECISION_TOLERANCE = 0.2


@dataclass(frozen=True, eq=False)
class TokenSamples:
    """Samples of unequal length, stored one after another.

    Attributes:
        input_ids: Token ids, ``(n,)`` int64.
        targets: True where a token is predicted from the ones before it in its sample, ``(n,)``.
        lengths: Tokens of each sample, at least 1, ``(N,)`` int64.
    """

    input_ids: Tensor
    targets: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        num_tokens = int(self.lengths.sum())
        if self.input_ids.shape != (num_tokens,) or self.targets.shape != (num_tokens,):
            raise ValueError(
                f"expected ids and targets of {num_tokens} tokens, the sum of lengths, got "
                f"{tuple(self.input_ids.shape)} and {tuple(self.targets.shape)}"
            )
        dtypes = (self.input_ids.dtype, self.targets.dtype, self.lengths.dtype)
        if dtypes != (torch.int64, torch.bool, torch.int64):
            raise ValueError(f"expected int64 ids and lengths, and boolean targets, got {dtypes}")
        if (self.lengths < 1).any():
            raise ValueError("every sample must have at least one token")
        if self.targets[self.starts].any():
            raise ValueError("the first token of a sample has nothing before it to predict it from")

    @classmethod
    def from_rows(cls, input_ids: Sequence[Tensor], targets: Sequence[Tensor]) -> Self:
        """Return samples that are given one by one.

        Args:
            input_ids: Token ids of each sample, ``(T,)`` int64.
            targets: True where a token is predicted, ``(T,)`` each.

        Returns:
            The samples, in their order.
        """
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int64), *input_ids]),
            torch.cat([torch.empty(0, dtype=torch.bool), *targets]),
            torch.tensor([len(row) for row in input_ids], dtype=torch.int64),
        )

    @cached_property
    def starts(self) -> Tensor:
        """Position of the first token of each sample, ``(N,)`` int64."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def num_targets_of(self) -> Tensor:
        """Number of predicted tokens of each sample, ``(N,)`` int64."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.targets.cumsum(0)])
        return before[self.starts + self.lengths] - before[self.starts]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Number of predicted tokens."""
        return int(self.targets.sum())

    @property
    def sha256(self) -> str:
        """Hash of the lengths, the ids and the targets, in hexadecimal."""
        digest = hashlib.sha256(self.lengths.numpy().astype("<i8").tobytes())
        digest.update(self.input_ids.numpy().astype("<i8").tobytes())
        digest.update(self.targets.numpy().tobytes())
        return digest.hexdigest()


def epoch_batches(
    samples: TokenSamples,
    batch_size: int,
    *,
    order: BatchOrder = "shuffled",
    row_length: int,
    seed: int,
    epoch: int,
) -> list[Rows]:
    """Deal all samples out to the batches of one epoch.

    Equal arguments give equal batches, so that a run that ended inside an epoch goes on at any of
    them. Every sample is in one batch. The number of batches is the same in all epochs.

    - ``shuffled``: a sample per row, in random order.
    - ``length_grouped``: a sample per row, next to samples of about its length, which leaves less
      padding. The batches are in random order, but one with the longest sample is the first: too
      little memory shows at once.
    - ``packed``: as many samples per row as fit into ``row_length``.

    Args:
        samples: The samples.
        batch_size: Rows per batch, at least 1; the last batch may have fewer.
        order: How samples meet.
        row_length: Most tokens of a row; no sample may be longer.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        The batches, in order.

    Raises:
        ValueError: If the batch size is below 1, or a sample is longer than a row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lengths: list[int] = samples.lengths.tolist()
    if lengths and max(lengths) > row_length:
        raise ValueError(f"a sample has {max(lengths)} tokens, but a row has {row_length}")
    generator = _generator(seed, epoch)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    if order == "length_grouped":
        return _length_grouped(shuffled, lengths, batch_size, generator)
    if order == "packed":
        rows = _packed(shuffled, lengths, row_length)
        mixed = torch.randperm(len(rows), generator=generator).tolist()
        return _batched([rows[number] for number in mixed], batch_size)
    return _batched([[index] for index in shuffled], batch_size)


def collate(samples: TokenSamples, rows: Rows, *, counts: bool = True) -> dict[str, Tensor]:
    """Return one batch in the form that models and losses take.

    The first token of a sample is no target, nor is padding, which follows all real tokens.

    Args:
        samples: The samples.
        rows: Indices of the samples in each row, at least one row.
        counts: False leaves all targets out, for a batch that only keeps other processes company.

    Returns:
        ``input_ids``, ``mask`` (real tokens), ``targets`` and ``position_ids`` (which start at 0
        with every sample, and are 0 in padding), each ``(B, T)`` with T the longest row.
    """
    length = max(sum(int(samples.lengths[index]) for index in row) for row in rows)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, _IGNORED_ID, dtype=torch.int64),
        "mask": torch.zeros(shape, dtype=torch.bool),
        "targets": torch.zeros(shape, dtype=torch.bool),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        column = 0
        for index in row:
            start, size = int(samples.starts[index]), int(samples.lengths[index])
            source, place = slice(start, start + size), (number, slice(column, column + size))
            batch["input_ids"][place] = samples.input_ids[source]
            batch["mask"][place] = True
            batch["targets"][place] = samples.targets[source] & counts
            batch["position_ids"][place] = torch.arange(size)
            column += size
    return batch


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


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Hashed: with a sum, one seed's second epoch would be the next seed's first.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _batched(rows: list[list[int]], batch_size: int) -> list[Rows]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _length_grouped(
    shuffled: list[int], lengths: list[int], batch_size: int, generator: torch.Generator
) -> list[Rows]:
    batches: list[Rows] = []
    size = batch_size * _GROUP_BATCHES
    for start in range(0, len(shuffled), size):
        group = sorted(shuffled[start : start + size], key=lambda index: lengths[index])
        batches += _batched([[index] for index in group], batch_size)
    order: list[int] = torch.randperm(len(batches), generator=generator).tolist()
    if order:
        first = max(order, key=lambda number: max(lengths[index] for (index,) in batches[number]))
        order.remove(first)
        order.insert(0, first)
    return [batches[number] for number in order]


def _packed(shuffled: list[int], lengths: list[int], row_length: int) -> list[list[int]]:
    """Put every sample, longest first, into the fullest row that has room for it."""
    rows: list[list[int]] = []
    # Rows by the room that is left in them.
    open_rows: list[list[list[int]]] = [[] for _ in range(row_length + 1)]
    for index in sorted(shuffled, key=lambda index: -lengths[index]):
        size = lengths[index]
        room = next((room for room in range(size, row_length) if open_rows[room]), None)
        if room is None:
            room = row_length
            rows.append([])
            row = rows[-1]
        else:
            row = open_rows[room].pop()
        row.append(index)
        open_rows[room - size].append(row)
    return rows
