"""A smaller vocabulary: which tokens stay, and a model and its tokenizer without the others."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.config import (
    CompressConfig,
    MethodConfig,
    ModelConfig,
    TokensConfig,
    VocabularySettings,
)
from grasp_lightning.data.corpora import (
    Corpus,
    CountedText,
    check_texts,
    corpora_of,
    counted_texts,
)
from grasp_lightning.data.sources import read_documents
from grasp_lightning.data.token_texts import count_tokens
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.formats.gguf.pretokenizers import pre_tokenizer_of
from grasp_lightning.models.gguf import read_header
from grasp_lightning.models.integrity import tensor_hash
from grasp_lightning.models.loading import LoadedModel, load_without_weights, model_hash
from grasp_lightning.models.size import count_bytes, count_parameters
from grasp_lightning.models.source import ModelOrigin, describe_origin, pinned, resolve_source
from grasp_lightning.models.vocabulary.choice import Choice, choose_tokens
from grasp_lightning.models.vocabulary.files import (
    TOKENIZER,
    fitting_files,
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

MODEL, VOCABULARY, TOKEN_COUNTS = "model", "vocabulary", "token_counts"  # inputs of a plan
SECTION = "tokens."
_ZEROING = ("wanda", "sparsegpt")


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


def check_vocabulary_keys(config: CompressConfig, *, is_given: bool = False) -> None:
    """Refuse keys of a vocabulary that contradict others; the method of ``config`` is resolved.

    Args:
        config: The compression.
        is_given: Whether the model is in memory already.

    Raises:
        ConfigError: If they do.
    """
    method, settings = config.method, config.tokens
    if method.vocabulary != "corpus":
        smooths = method.embeddings == "factors"
        own = replace(settings, corpora=()) if smooths else settings
        if smooths and settings.corpora:
            corpora_of(settings, SECTION)
            own = replace(own, field="text")
        default = vars(TokensConfig())
        ignored = [key for key, value in vars(own).items() if value != default[key]]
        if ignored:
            key = "corpora" if "corpora" in ignored else ignored[0]
            also = " or method.embeddings=factors" if key == "corpora" else ""
            raise ConfigError(
                f"{SECTION}{key} has no effect: set method.vocabulary=corpus{also}, or "
                "leave it unset"
            )
        return
    if method.name in _ZEROING:
        raise ConfigError(
            f"method.vocabulary is corpus, but method {method.name} sets weights to zero and "
            "removes none: trim first, and compress the trimmed model"
        )
    corpora_of(settings, SECTION)
    if is_given:
        raise ConfigError(
            "method.vocabulary is corpus, but the model is already in memory: give its path, or "
            "call trim_vocabulary first"
        )
    if config.trainer.strategy == "fsdp":
        raise ConfigError(
            "method.vocabulary is corpus, but trainer.strategy fsdp divides rows among processes: "
            "use ddp, or trim first"
        )


class Vocabulary(NamedTuple):
    """A model with the vocabulary that a compression starts from.

    Attributes:
        loaded: Model, tokenizer, and origin with the files that fit them.
        method: The method, whose ``removed_ratio`` is what is left of the budget.
        hashes: Of this model, and of what else decides on the vocabulary, for the plan.
        facts: What trimming removed; None if all tokens stay.
        counts: How often the corpora use each token, ``(V,)`` int64; None if nobody asks.
    """

    loaded: LoadedModel
    method: MethodConfig
    hashes: Mapping[str, str]
    facts: TrimFacts | None
    counts: Tensor | None


def vocabulary_of(config: CompressConfig, loaded: LoadedModel, digest: str) -> Vocabulary:
    """Count tokens, and trim the vocabulary of a loaded model, as a configuration says.

    ``check_vocabulary_keys`` has passed.

    Args:
        config: The compression.
        loaded: The model, which is trimmed in place.
        digest: Its ``model_hash``.
    """
    method, hashes, facts, counts = config.method, {MODEL: digest}, None, None
    if method.vocabulary == "corpus":
        trimming, (loaded, method, facts) = _trimmed(config, loaded)
        counts, rows = trimming.counts(), torch.tensor(trimming.choice.rows)
        hashes = {MODEL: model_hash(loaded.model), VOCABULARY: tensor_hash(rows)}
    elif config.tokens.corpora:
        corpora = corpora_of(config.tokens, SECTION)
        size = loaded.model.get_input_embeddings().get_parameter("weight").shape[0]
        texts = [read_documents(text.section, "calibration") for text in corpora if text.is_named]
        found = [count_tokens(text, loaded.tokenizer, size).counts for text in texts]
        counts = torch.stack(found).sum(dim=0)
    if method.embeddings != "factors" or counts is None:
        return Vocabulary(loaded, method, hashes, facts, None)
    return Vocabulary(loaded, method, {**hashes, TOKEN_COUNTS: tensor_hash(counts)}, facts, counts)


def _trimmed(
    config: CompressConfig, loaded: LoadedModel
) -> tuple[Trimming, tuple[LoadedModel, MethodConfig, TrimFacts]]:
    model, origin = loaded.model, loaded.origin
    trimming = trimming_of(
        loaded, config.model, config.tokens, corpora_of(config.tokens, SECTION), SECTION
    )
    parameters, num_bytes = count_parameters(model), count_bytes(model)
    logits = trimming.trim(model)
    change = Change(before=parameters, after=count_parameters(model))
    method = left_to_remove(config.method, change)
    tokenizer, found = _read_again(config, trimming, model, change)
    origin = replace(origin, side_files=fitting_files(origin.side_files))
    loaded = LoadedModel(model=model, tokenizer=tokenizer, origin=origin)
    facts = trimming.facts(origin.name, model, found, num_bytes, logits)
    return trimming, (loaded, method, facts)


class WithoutWeights(NamedTuple):
    """A model on the meta device, as a compression starts from it.

    Attributes:
        config: The configuration, with what is left of the budget.
        vocabulary: What trimming removes; None if all tokens stay.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: CompressConfig
    vocabulary: VocabularyChange | None = None


def without_weights(config: CompressConfig) -> WithoutWeights:
    """Load a model without weights; trim its vocabulary if the configuration says so."""
    model, tokenizer = load_without_weights(config.model)
    check_not_quantized(model, ModelError)
    if config.method.vocabulary != "corpus":
        return WithoutWeights(model, tokenizer, config)
    loaded = LoadedModel(model=model, tokenizer=tokenizer, origin=_origin(config.model))
    trimming = trimming_of(
        loaded, config.model, config.tokens, corpora_of(config.tokens, SECTION), SECTION
    )
    parameters = count_parameters(model)
    trim_rows(model, trimming.choice.rows)
    change = Change(before=parameters, after=count_parameters(model))
    config = replace(config, method=left_to_remove(config.method, change))
    tokenizer, found = _read_again(config, trimming, model, change)
    return WithoutWeights(model, tokenizer, config, found)


@contextmanager
def shares_of_the_rest(trimmed: VocabularyChange | TrimFacts | None) -> Iterator[None]:
    """Say of which model the shares in a refusal are; None if its vocabulary was not trimmed."""
    try:
        yield
    except ConfigError as error:
        if trimmed is None:
            raise
        whole = f"the {trimmed.parameters.after:,} parameters that trimming the vocabulary leaves"
        raise ConfigError(f"{error} (shares of {whole})") from error


def left_to_remove(method: MethodConfig, parameters: Change[int]) -> MethodConfig:
    """Return a method that removes what trimming leaves of its budget.

    Raises:
        ConfigError: If trimming alone removes as much.
    """
    if method.removed_ratio is None:
        return method
    before, after = parameters.values
    left = round(method.removed_ratio * before) - (before - after)
    if left <= 0:
        raise ConfigError(
            f"method.removed_ratio is {method.removed_ratio}, but trimming the vocabulary alone "
            f"removes {1 - after / before:.4f}: set a higher one, keep more tokens "
            "(tokens.num_tokens, tokens.corpora), or only run trim"
        )
    return replace(method, removed_ratio=left / after)


def _read_again(
    config: CompressConfig, trimming: Trimming, model: PreTrainedModel, parameters: Change[int]
) -> tuple[PreTrainedTokenizerBase, VocabularyChange]:
    """Return the trimmed tokenizer as transformers reads it from a folder, and what was removed."""
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        code = config.model.trust_remote_code
        tokenizer = trimming.written(Path(folder), trust_remote_code=code)
    tokenizer.name_or_path = trimming.tokenizer.name_or_path
    return tokenizer, trimming.change(tokenizer, parameters)


def _origin(config: ModelConfig) -> ModelOrigin:
    return describe_origin(pinned(resolve_source(config)))


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
