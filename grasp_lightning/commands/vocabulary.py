"""The vocabulary that a compression starts from: the whole one, or one that is trimmed first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.commands.trimming import Trimming, trimming_of
from grasp_lightning.config import CompressConfig, MethodConfig, ModelConfig, TokensConfig
from grasp_lightning.data.corpora import corpora_of
from grasp_lightning.data.sources import read_documents
from grasp_lightning.data.token_texts import count_tokens
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.integrity import tensor_hash
from grasp_lightning.models.loading import LoadedModel, load_without_weights, model_hash
from grasp_lightning.models.size import count_bytes, count_parameters
from grasp_lightning.models.source import ModelOrigin, describe_origin, pinned, resolve_source
from grasp_lightning.models.vocabulary.files import fitting_files
from grasp_lightning.models.vocabulary.rows import trim_rows
from grasp_lightning.reporting.metrics import Change, VocabularyChange
from grasp_lightning.reporting.trimming import TrimFacts

MODEL, VOCABULARY, TOKEN_COUNTS = "model", "vocabulary", "token_counts"  # inputs of a plan
SECTION = "tokens."
_ZEROING = ("wanda", "sparsegpt")


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
    trimming = _chosen(config, loaded)
    parameters, num_bytes = count_parameters(model), count_bytes(model)
    logits = trimming.trim(model)
    method, tokenizer, found = _left(config, trimming, model, parameters)
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
    trimming, parameters = _chosen(config, loaded), count_parameters(model)
    trim_rows(model, trimming.choice.rows)
    method, tokenizer, found = _left(config, trimming, model, parameters)
    return WithoutWeights(model, tokenizer, replace(config, method=method), found)


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


def _chosen(config: CompressConfig, loaded: LoadedModel) -> Trimming:
    corpora = corpora_of(config.tokens, SECTION)
    return trimming_of(loaded, config.model, config.tokens, corpora, SECTION)


def _left(
    config: CompressConfig, trimming: Trimming, model: PreTrainedModel, parameters: int
) -> tuple[MethodConfig, PreTrainedTokenizerBase, VocabularyChange]:
    """Return what a trimmed model leaves: the budget, its tokenizer, and what was removed.

    The tokenizer is the one that transformers reads from a folder.

    Args:
        parameters: Those of the model before.
    """
    change = Change(before=parameters, after=count_parameters(model))
    method = left_to_remove(config.method, change)
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        code = config.model.trust_remote_code
        tokenizer = trimming.written(Path(folder), trust_remote_code=code)
    tokenizer.name_or_path = trimming.tokenizer.name_or_path
    return method, tokenizer, trimming.change(tokenizer, change)


def _origin(config: ModelConfig) -> ModelOrigin:
    return describe_origin(pinned(resolve_source(config)))
