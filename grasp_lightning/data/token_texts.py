"""How texts are split into tokens: counts, lengths, and comparison of two tokenizers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp_lightning.data.sources import Documents
from grasp_lightning.progress import track

_BATCH = 64  # documents at once
_MAX_QUOTED = 60  # characters


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """The tokens of a text.

    Attributes:
        num_bytes: Length of the text in UTF-8.
        counts: How often each id occurs, ``(V,)`` int64.
        first: Its first tokens, ``(n,)`` int64.
    """

    num_bytes: int
    counts: Tensor
    first: Tensor

    @property
    def num_tokens(self) -> int:
        """Length of the text in tokens."""
        return int(self.counts.sum())

    @property
    def num_used(self) -> int:
        """Number of different tokens."""
        return int((self.counts > 0).sum())


def count_tokens(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, size: int, num_first: int = 0
) -> TokenCounts:
    """Count the tokens of all documents, without special tokens around them.

    Args:
        size: Number of ids, V.
        num_first: How many of the first tokens to return.
    """
    counts, first = torch.zeros(size, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    num_bytes = 0
    for texts in _batches(documents, "counting tokens of"):
        ids = torch.cat(_encoded(tokenizer, texts))
        counts += torch.bincount(ids, minlength=size)
        first = (
            torch.cat([first, ids[: num_first - len(first)]]) if len(first) < num_first else first
        )
        num_bytes += sum(len(text.encode(errors="surrogatepass")) for text in texts)
    return TokenCounts(num_bytes=num_bytes, counts=counts, first=first)


def find_other_pieces(
    documents: Documents,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    new_ids: Mapping[int, int],
) -> str | None:
    """Return where two tokenizers split a text differently; None if nowhere.

    Args:
        new_ids: Id of ``new`` for each id of ``old``; others count as different.
    """
    table = torch.full((max(*new_ids, *old.get_vocab().values()) + 1,), -1)
    table[list(new_ids)] = torch.tensor(list(new_ids.values()))
    for texts in _batches(documents, "comparing pieces of"):
        pairs = zip(texts, _encoded(old, texts), _encoded(new, texts), strict=True)
        for text, before, after in pairs:
            if not torch.equal(table[before], after):
                return f"a text of {documents.name} that begins with {text[:_MAX_QUOTED]!r}"
    return None


def find_other_text(
    documents: Documents, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase
) -> str | None:
    """Return which text two tokenizers decode differently from their own tokens; None if none."""
    for texts in _batches(documents, "decoding"):
        for text in texts:
            before, after = (_decoded(tokenizer, text) for tokenizer in (old, new))
            if before != after:
                return f"a text of {documents.name} that begins with {text[:_MAX_QUOTED]!r}"
    return None


def _batches(documents: Documents, doing: str) -> Iterator[Sequence[str]]:
    texts = [text for text in documents.texts if text]
    starts: Iterable[int] = range(0, len(texts), _BATCH)
    # On standard error: standard output is for the result. In a log, a refusal is one line.
    console = Console(stderr=True)
    if console.is_terminal:
        starts = track(starts, f"{doing} {documents.name}", console=console)
    for start in starts:
        yield texts[start : start + _BATCH]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tensor]:
    # verbose: a corpus is meant to be longer than the model's context.
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids, dtype=torch.int64) for ids in found]


def _decoded(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    (ids,) = _encoded(tokenizer, [text])
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)  # of one text
    return decoded
