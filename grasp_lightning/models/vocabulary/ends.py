"""The embedding and the head of a model: the two ends that have one row per token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.errors import ModelError
from grasp_lightning.models.factored_rows import factorized_rows
from grasp_lightning.models.vocabulary.rows import check_ends, special_ids


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Embedding and head of a model.

    Attributes:
        embedding: Full name of the embedding.
        head: Full name of the head.
        is_tied: Whether they share one matrix.
        scale: What the embedding multiplies its rows by.
        shape: ``(V, d)`` of the matrix, or of both matrices.
        special: Ids of tokens that the configs name, such as that of padding, ascending.
    """

    embedding: str
    head: str
    is_tied: bool
    scale: float
    shape: tuple[int, int]
    special: tuple[int, ...]

    @property
    def matrices(self) -> tuple[tuple[str, ...], ...]:
        """Full names of the modules of each matrix: one for both ends, or one for each."""
        both = (self.embedding, self.head)
        return (both,) if self.is_tied else ((self.embedding,), (self.head,))


def vocabulary_ends(model: PreTrainedModel) -> Ends:
    """Return embedding and head of a model, whose weights may be on the meta device.

    Raises:
        ModelError: If it has no such ends, other modules share their rows, or the rows are
            factorized already.
    """
    if done := list(factorized_rows(model)):
        raise ModelError(
            f"method.embeddings: {done[-1]} consists of factors already; set "
            "method.embeddings=none, or compress the original model"
        )
    embedding, head = check_ends(model)
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"method.embeddings: the head of {type(model).__name__} is a {type(head).__name__}, "
            "expected a Linear; set method.embeddings=none"
        )
    return Ends(
        embedding=names[id(embedding)],
        head=names[id(head)],
        is_tied=head.weight is embedding.weight,
        scale=embedding_scale(embedding),
        shape=(int(embedding.weight.shape[0]), int(embedding.weight.shape[1])),
        special=tuple(sorted(special_ids(model, embedding.weight.shape[0]))),
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the special tokens of a tokenizer."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added if token.special)})


def embedding_scale(embedding: nn.Embedding) -> float:
    """Return what an embedding multiplies its rows by.

    Raises:
        ModelError: If it computes something else.
    """
    if type(embedding) is nn.Embedding:
        return 1.0
    holder: Any = embedding  # Any: an attribute of some families
    found = getattr(holder, "scalar_embed_scale", getattr(holder, "embed_scale", None))
    is_fitting = isinstance(found, float | int)
    scale = float(found) if isinstance(found, float | int) else 1.0
    if is_fitting and not embedding.weight.is_meta:
        with torch.no_grad():
            ids = torch.arange(min(4, len(embedding.weight)), device=embedding.weight.device)
            scaled = embedding.weight[ids].float() * scale
            is_fitting = torch.allclose(embedding(ids).float(), scaled, rtol=1e-2, atol=1e-6)
    if not is_fitting:
        raise ModelError(
            f"method.embeddings: {type(embedding).__name__} does more than look up rows and scale "
            "them; set method.embeddings=none"
        )
    return scale
