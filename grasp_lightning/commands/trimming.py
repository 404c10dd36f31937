"""A trimmed vocabulary: which tokens stay, and a model and its tokenizer without the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.config import ModelConfig, VocabularySettings
from grasp_lightning.data.corpora import Corpus, CountedText, check_texts, counted_texts
from grasp_lightning.data.token_texts import count_tokens
from grasp_lightning.errors import ModelError
from grasp_lightning.models.formats.gguf.pretokenizers import pre_tokenizer_of
from grasp_lightning.models.gguf import read_header
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.size import count_bytes
from grasp_lightning.models.source import resolve_source
from grasp_lightning.models.vocabulary.choice import Choice, choose_tokens
from grasp_lightning.models.vocabulary.files import (
    TOKENIZER,
    processor_tokens,
    read_tokenizer,
    tokenizer_content,
    write_tokenizer,
)
from grasp_lightning.models.vocabulary.logits import Difference, compare_logits, kept_logits
from grasp_lightning.models.vocabulary.pieces import pieces_of
from grasp_lightning.models.vocabulary.rows import check_rows, special_ids, trim_rows
from grasp_lightning.reporting.metrics import Change, TextLength, VocabularyChange
from grasp_lightning.reporting.trimming import TrimFacts


@dataclass(frozen=True, kw_only=True)
class Trimming:
    """A vocabulary to trim, checked.

    Attributes:
        tokenizer: The tokenizer before.
        tokens: Text of every token by its id.
        special: Those that were added to the pieces.
        num_rows: Rows of the embedding.
        texts: The corpora and the unnamed text.
        choice: The tokens that stay.
        pre_tokenizer: llama.cpp's name of it, if it has one.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: Mapping[int, str]
    special: Mapping[int, str]
    num_rows: int
    texts: Sequence[CountedText]
    choice: Choice
    pre_tokenizer: str | None

    def trim(self, model: PreTrainedModel) -> Difference:
        """Remove the rows of the other tokens from a model, in place.

        Logits of the tokens that stay, if they change, are a ``ModelError``.
        """
        rows = self.choice.rows
        windows, kept = [text.counts.first.tolist() for text in self.texts], torch.tensor(rows)
        before = kept_logits(model, windows, range(self.num_rows), kept)
        trim_rows(model, rows)
        return compare_logits(before, kept_logits(model, windows, rows, kept), model.dtype)

    def written(self, folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        """Write the trimmed tokenizer beside the config of its model, read it, and check it.

        A text that would be read differently is a ``ModelError``.
        """
        ids = self.choice.new_ids
        write_tokenizer(self.tokenizer, folder, ids, self.pre_tokenizer)
        vocabulary = {text: ids[index] for index, text in self.tokens.items() if index in ids}
        new = read_tokenizer(folder, vocabulary, trust_remote_code=trust_remote_code)
        check_texts(self.texts, self.tokenizer, new, ids, same_pieces=self.choice.keeps_all_used)
        return new

    def change(self, new: PreTrainedTokenizerBase, parameters: Change[int]) -> VocabularyChange:
        """Return the numbers removed, and how long texts are with the trimmed tokenizer."""
        size = len(self.choice.rows)
        return VocabularyChange(
            tokens=Change(before=self.num_rows, after=size),
            parameters=parameters,
            same_pieces=self.choice.keeps_all_used,
            texts=tuple(_length(text, new, size) for text in self.texts if text.is_shown),
        )

    def facts(
        self,
        name: str,
        model: PreTrainedModel,
        change: VocabularyChange,
        num_bytes: int,
        logits: Difference,
    ) -> TrimFacts:
        """Return the content of trim.json.

        Args:
            name: Name of the original model.
            model: The trimmed one.
            change: See ``change``.
            num_bytes: Bytes of all parameters before.
            logits: See ``trim``.
        """
        choice = self.choice
        return TrimFacts(
            model=name,
            dtype=str(model.dtype).removeprefix("torch."),
            tokens=change.tokens,
            parameters=change.parameters,
            bytes=Change(before=num_bytes, after=count_bytes(model)),
            used_tokens=choice.num_used,
            filling_tokens=choice.num_fillers,
            same_pieces=choice.keeps_all_used,
            logit_difference=logits.difference,
            largest_logit=logits.largest,
            special_tokens={text: choice.new_ids[old] for old, text in self.special.items()},
            texts=change.texts,
        )

    def counts(self) -> Tensor:
        """Return how often the corpora use each token that stays, ``(n,)`` int64."""
        found = [t.counts.counts for t in self.texts if t.is_named and t.is_shown]
        return torch.stack(found).sum(dim=0)[torch.tensor(self.choice.rows)]


def trimming_of(
    loaded: LoadedModel,
    config: ModelConfig,
    settings: VocabularySettings,
    corpora: Sequence[Corpus],
    section: str = "",
) -> Trimming:
    """Check a model, count the tokens of all texts, and choose those that stay.

    Args:
        loaded: The model, whose weights may be on the meta device.
        config: How it was loaded.
        settings: How many tokens stay.
        corpora: The texts, from ``corpora_of``.
        section: Prefix of the keys of ``settings`` in messages.

    Raises:
        ModelError: If model or tokenizer cannot be trimmed.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    gguf_file = resolve_source(config).gguf_file
    has_file = gguf_file is not None or any(
        file.name == TOKENIZER for file in loaded.origin.side_files
    )
    content = tokenizer_content(tokenizer, has_file=has_file)
    pieces = pieces_of(content)
    num_rows = check_rows(model)
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    tokens = {**{index: piece for piece, index in pieces.ids.items()}, **added}
    if max(tokens) >= num_rows:
        raise ModelError(
            f"the tokenizer has token {max(tokens)}, but the model has only {num_rows} rows: they "
            "do not belong together"
        )
    texts = [text for corpus in corpora for text in counted_texts(corpus, tokenizer, num_rows)]
    counts = torch.stack([text.counts.counts for text in texts if text.is_named]).sum(dim=0)
    protected = {*processor_tokens(content), *special_ids(model, num_rows)}
    choice = choose_tokens(
        pieces,
        tokens,
        counts.tolist(),
        protected.union(tokenizer.all_special_ids),
        multiple_of=settings.multiple_of,
        num_tokens=settings.num_tokens,
        section=section,
    )
    return Trimming(
        tokenizer=tokenizer,
        tokens=tokens,
        special=added,
        num_rows=num_rows,
        texts=texts,
        choice=choice,
        pre_tokenizer=read_header(gguf_file).pre_tokenizer
        if gguf_file is not None
        else pre_tokenizer_of(tokenizer),
    )


def _length(text: CountedText, tokenizer: PreTrainedTokenizerBase, size: int) -> TextLength:
    before, num_bytes = text.counts.num_tokens, text.counts.num_bytes
    after = count_tokens(text.documents, tokenizer, size).num_tokens
    return TextLength(
        name=text.name,
        is_named=text.is_named,
        num_bytes=num_bytes,
        tokens=Change(before=before, after=after),
        tokens_per_byte=Change(before=before / num_bytes, after=after / num_bytes),
    )
