"""Documents as one stream of tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def token_stream(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> tuple[Tensor, Tensor]:
    """Tokenise documents, each once and without special tokens, into one stream.

    Args:
        documents: Texts, in order.
        tokenizer: Tokenizer of the model.
        wanted: Read no further document once there are so many tokens; None reads all.

    Returns:
        Token ids, ``(n,)`` int64, and True where a document begins, ``(n,)``.
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
