"""Token windows: a corpus, tokenized once and cut into pieces of equal length."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp_lightning import processes
from grasp_lightning.errors import ConfigError

MIN_TOKENS = 2
"""Fewest tokens of a window: one to predict, and one before it."""

_WINDOW_DIMS = 2  # (N, T)


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of tokens; compare their ``sha256`` for equality.

    Attributes:
        input_ids: Token ids, ``(N, T)`` int64.
        mask: True for real tokens, False for padding, ``(N, T)``.
        targets: True where a token is predicted from those before it in its window, ``(N, T)``.
    """

    input_ids: Tensor
    mask: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.input_ids, self.mask, self.targets)}
        if len(shapes) != 1 or self.input_ids.dim() != _WINDOW_DIMS:
            raise ValueError(f"expected three tensors of one shape (N, T), got {sorted(shapes)}")
        dtypes = (self.input_ids.dtype, self.mask.dtype, self.targets.dtype)
        if dtypes != (torch.int64, torch.bool, torch.bool):
            raise ValueError(f"expected int64 ids and boolean mask and targets, got {dtypes}")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return int(self.mask.sum())

    @property
    def num_targets(self) -> int:
        """Number of predicted tokens."""
        return int(self.targets.sum())

    @property
    def sha256(self) -> str:
        """Hash of the shape, the ids, the mask and the targets, in hexadecimal."""
        digest = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        for flags in (self.mask, self.targets):
            digest.update(flags.cpu().numpy().tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return the windows at some indices, in the order of the indices."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return type(self)(self.input_ids[rows], self.mask[rows], self.targets[rows])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some windows in the form that models and observers take.

        Returns:
            ``input_ids``, ``mask``, ``targets``, each ``(B, T)``, and ``index`` ``(B,)`` int64.
        """
        part = self.select(indices)
        return {
            "input_ids": part.input_ids,
            "mask": part.mask,
            "targets": part.targets,
            "index": torch.tensor(indices, dtype=torch.int64),
        }

    def padding(self) -> dict[str, Tensor]:
        """Return a batch for a process that runs out of windows before the others.

        It is the first window without targets, and ``index`` is empty: the model runs, but nothing
        counts.
        """
        batch = self.batch([0])
        return {**batch, "targets": torch.zeros_like(batch["targets"]), "index": batch["index"][:0]}


def own_micro_batches(windows: TokenWindows, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the windows of this process in batches as ``collate`` gives them.

    Every process has the same number of batches; surplus ones have no targets.
    """
    batches = []
    for indices, counts in processes.own_batches(range(len(windows)), batch_size):
        part = windows.select(indices)
        positions = torch.arange(part.input_ids.shape[1])
        batches.append(
            {
                "input_ids": part.input_ids,
                "mask": part.mask,
                "targets": part.targets & counts,
                "position_ids": positions * part.mask,
            }
        )
    return batches


def batches(windows: TokenWindows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield all windows in order, as ``TokenWindows.batch`` gives them."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(windows), batch_size):
        yield windows.batch(range(start, min(start + batch_size, len(windows))))


def bos_prefix(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> list[int]:
    """Return the beginning-of-sequence token as a list, which is empty without ``add_bos``."""
    if not add_bos:
        return []
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            "add_bos is set, but the tokenizer has no beginning-of-sequence token; "
            "set add_bos: false"
        )
    return [tokenizer.bos_token_id]


def pack_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    add_bos: bool,
    tail: Literal["drop", "keep"] = "drop",
    pad_id: int = 0,
    enough: int | None = None,
) -> TokenWindows:
    """Tokenize documents and cut the stream of tokens into non-overlapping windows.

    Each document is tokenized once, without special tokens. The first token of a window is never a
    target, nor is the first token of a document, because nothing before it predicts it.

    Args:
        documents: Texts, in order.
        seqlen: Tokens per window, at least 2; ``add_bos`` takes one of them.
        add_bos: Start every window with the beginning-of-sequence token.
        tail: Drop a last, shorter window, or pad and keep it if it has two real tokens.
        pad_id: Id that pads the tail. It is masked and follows all real tokens, so any id in the
            vocabulary works.
        enough: Stop reading documents once this many windows are full; None reads all. Surplus
            windows from the last document are kept.

    Returns:
        The windows; none if there are too few tokens.

    Raises:
        ValueError: If ``seqlen`` is below 2.
    """
    if seqlen < MIN_TOKENS:
        raise ValueError(f"seqlen must be at least {MIN_TOKENS}, got {seqlen}")
    prefix = bos_prefix(tokenizer, add_bos)
    stride = seqlen - len(prefix)  # corpus tokens per window
    wanted = None if enough is None else enough * stride
    tokens, is_seam = _token_stream(documents, tokenizer, wanted)
    num_windows, rest = divmod(len(tokens), stride)
    if tail == "keep" and len(prefix) + rest >= MIN_TOKENS:
        num_windows += 1

    def rows(stream: Tensor, fill: int) -> Tensor:
        """Return a stream, trimmed or filled up at its end, as (num_windows, stride)."""
        stream = stream[: num_windows * stride]
        filling = stream.new_full((num_windows * stride - len(stream),), fill)
        return torch.cat([stream, filling]).view(num_windows, stride)

    bos = torch.tensor(prefix, dtype=torch.int64).expand(num_windows, -1)  # (num_windows, 0 or 1)
    mask = torch.cat([bos >= 0, rows(torch.ones_like(is_seam), False)], dim=1)
    targets = torch.cat([bos < 0, rows(~is_seam, False)], dim=1)
    targets[:, 0] = False
    return TokenWindows(torch.cat([bos, rows(tokens, pad_id)], dim=1), mask, targets)


def _token_stream(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> tuple[Tensor, Tensor]:
    """Return the token ids of documents, ``(n,)``, and True where a document begins, ``(n,)``.

    Once there are ``wanted`` tokens, no further document is read; None reads all.
    """
    pieces = [torch.empty(0, dtype=torch.int64)]
    seams = []
    length = 0
    for text in documents:
        if wanted is not None and length >= wanted:
            break
        # verbose: a corpus is meant to be longer than the model's context.
        encoding = tokenizer(text, add_special_tokens=False, verbose=False)
        piece = torch.tensor(encoding["input_ids"], dtype=torch.int64)
        if len(piece) > 0:
            pieces.append(piece)
            seams.append(length)
            length += len(piece)
    is_seam = torch.zeros(length, dtype=torch.bool)
    is_seam[seams] = True
    return torch.cat(pieces), is_seam
