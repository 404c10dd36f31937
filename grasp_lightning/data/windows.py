"""Token windows: a corpus, tokenised once and cut into pieces of equal length."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp_lightning import processes
from grasp_lightning.data.token_stream import token_stream
from grasp_lightning.errors import ConfigError

MIN_TOKENS = 2
"""Fewest tokens of a window: one to predict, and one before it."""

_WINDOW_DIMS = 2  # (N, T)


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of tokens; two of them are equal if their ``sha256`` is.

    Attributes:
        input_ids: Token ids, ``(N, T)`` int64.
        mask: True where a token is real, False where it is padding, ``(N, T)``.
        targets: True where a token is predicted from the ones before it in its window, ``(N, T)``.
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
        """Return the number of windows."""
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
        """Return some of the windows.

        Args:
            indices: Which ones, in the order wanted.

        Returns:
            New windows of the same length.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return type(self)(self.input_ids[rows], self.mask[rows], self.targets[rows])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some of the windows in the form that models and observers take.

        Args:
            indices: Which ones.

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
        """Return a batch for a process that has no window left, while others have.

        Returns:
            The first window, as ``batch`` gives it, but without a target and with an empty
            ``index``: the model can run, and nothing is counted.
        """
        batch = self.batch([0])
        return {**batch, "targets": torch.zeros_like(batch["targets"]), "index": batch["index"][:0]}


def own_micro_batches(windows: TokenWindows, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the windows of this process in batches, as many of them in every process.

    Args:
        windows: The windows of all processes.
        batch_size: Windows per batch.

    Returns:
        Batches as ``collate`` gives them; where windows are not enough, some without targets.
    """
    batches = []
    for indices, counts in processes.own_batches(range(len(windows)), batch_size):
        part = windows.select(indices)
        positions = torch.arange(part.input_ids.shape[1]).expand_as(part.input_ids)
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
    """Yield all windows in their order, some at a time.

    Args:
        windows: The windows.
        batch_size: Windows per batch; the last batch may hold fewer.

    Yields:
        Batches as ``TokenWindows.batch`` gives them.

    Raises:
        ValueError: If the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(windows), batch_size):
        yield windows.batch(range(start, min(start + batch_size, len(windows))))


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
    """Tokenise documents and cut the stream of their tokens into windows that do not overlap.

    Each document is tokenised once, without special tokens. The first token of a window is never a
    target, nor is the first token of a document, which nothing before it announces.

    Args:
        documents: Texts, in order.
        tokenizer: Tokenizer of the model.
        seqlen: Tokens per window, at least 2; with ``add_bos`` one of them is not from the corpus.
        add_bos: Start every window with the beginning-of-sequence token.
        tail: Drop a last, shorter window, or keep it, padded, if it has two real tokens.
        pad_id: Id that fills the tail. It is masked, and no real token comes after it, so any id
            that the model knows will do.
        enough: Read no further document once this many windows are full; None reads all. Windows
            beyond this number, from the last document read, are kept.

    Returns:
        The windows; none if there are too few tokens.

    Raises:
        ConfigError: If ``add_bos`` is set and the tokenizer has no such token.
        ValueError: If ``seqlen`` is below 2.
    """
    if seqlen < MIN_TOKENS:
        raise ValueError(f"seqlen must be at least {MIN_TOKENS}, got {seqlen}")
    if add_bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            "add_bos is set, but the tokenizer has no beginning-of-sequence token; "
            "set add_bos: false"
        )
    prefix = [tokenizer.bos_token_id] if add_bos else []
    stride = seqlen - len(prefix)  # corpus tokens per window
    wanted = None if enough is None else enough * stride
    tokens, is_seam = token_stream(documents, tokenizer, wanted)
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
