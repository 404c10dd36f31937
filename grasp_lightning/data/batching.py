"""Token samples of unequal length, and the batches of an epoch: padded, grouped or packed.

Legend: N samples with n tokens in total, B rows of T tokens in a batch.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from grasp_lightning.config import BatchOrder

Rows = list[list[int]]
"""The rows of one batch: the indices of the samples in each, in order."""

MicroBatch = dict[str, Tensor]
"""``input_ids``, ``mask``, ``targets`` and ``position_ids``, each ``(B, T)``; see ``collate``."""

Extras = Callable[[Sequence[int]], Mapping[str, Tensor]]
"""Indices of samples -> tensors with one row for each of their predicted tokens, in order."""

_GROUP_BATCHES = 50  # batches whose samples are sorted by length together
_IGNORED_ID = 0  # padding: masked, and after all real tokens, so any id works


@dataclass(frozen=True, eq=False)
class TokenSamples:
    """Samples of unequal length, stored back to back.

    Attributes:
        input_ids: Token ids, ``(n,)`` int64.
        targets: True where a token is predicted from the preceding tokens of its sample, ``(n,)``.
        lengths: Number of tokens in each sample, at least 1, ``(N,)`` int64.
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
        """Return samples from separate ids (int64) and targets (bool), each ``(T,)``."""
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
    """Return the batches of one epoch; together they contain every sample once.

    Equal arguments give equal batches, so a run can resume anywhere inside an epoch. The number of
    batches is the same in all epochs.

    - ``shuffled``: one sample per row, in random order.
    - ``length_grouped``: one sample per row, batched with samples of similar length to reduce
      padding. The batch order is random, except that a batch with the longest sample comes first:
      if memory is too small, the run fails at once.
    - ``packed``: as many samples per row as fit into ``row_length`` tokens.

    Args:
        batch_size: Rows per batch, at least 1; the last batch may have fewer.
        row_length: Maximum tokens per row; no sample may be longer.

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


def collate(
    samples: TokenSamples, rows: Rows, *, counts: bool = True, extras: Extras | None = None
) -> dict[str, Tensor]:
    """Return one batch in the form that models and losses take.

    Args:
        rows: Indices of the samples in each row; at least one row.
        counts: False clears all targets, for a batch that only keeps processes in step.
        extras: What else is known of the predicted tokens; it is added to the batch.

    Returns:
        ``input_ids``, ``mask`` (real tokens, which precede the padding), ``targets`` and
        ``position_ids`` (restart at 0 with every sample, and 0 in padding), each ``(B, T)``, where
        T is the longest row.
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
    if extras is not None:
        batch |= extras([index for row in rows for index in row] if counts else [])
    return batch


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
    open_rows: list[list[list[int]]] = [[] for _ in range(row_length + 1)]  # by remaining room
    for index in sorted(shuffled, key=lambda index: -lengths[index]):
        size = lengths[index]
        room = next((room for room in range(size, row_length) if open_rows[room]), row_length)
        if room < row_length:
            row = open_rows[room].pop()
        else:
            row = []
            rows.append(row)
        row.append(index)
        open_rows[room - size].append(row)
    return rows
