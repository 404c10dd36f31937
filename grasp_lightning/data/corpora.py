"""The texts behind a vocabulary: corpora whose tokens count, and one that is not named."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from grasp_lightning.config import EvaluationConfig, TokensConfig, TrimConfig
from grasp_lightning.data.sources import Documents, corpus_named, read_documents
from grasp_lightning.data.token_texts import (
    TokenCounts,
    count_tokens,
    find_other_pieces,
    find_other_text,
)
from grasp_lightning.errors import ConfigError, DataError, ModelError
from grasp_lightning.reading.text import read_text

_LEAST_USED = 1000  # different tokens of a corpus
_NUM_FIRST = 64  # tokens of each text whose logits are compared
_COLUMNS = (".jsonl", ".parquet")


class Corpus(NamedTuple):
    """How to read a text, whether it is one of ``corpora``, and the key that names it."""

    section: EvaluationConfig
    is_named: bool
    key: str = "corpora"


@dataclass(frozen=True, kw_only=True)
class CountedText:
    """A text, and its tokens before.

    Attributes:
        is_named: Whether it is one of ``corpora``.
        is_shown: Whether the report has it, or another form of it.
    """

    documents: Documents
    counts: TokenCounts
    is_named: bool
    is_shown: bool

    @property
    def name(self) -> str:
        """Name without a folder."""
        return self.documents.name.rpartition("/")[2]


def corpora_of(config: TrimConfig | TokensConfig, section: str = "") -> list[Corpus]:
    """Return how to read the corpora, and last the unnamed text, without reading any.

    Args:
        config: What names them.
        section: Prefix of its keys in messages, such as ``tokens.``.

    Raises:
        ConfigError: If a name is unknown or given twice, or ``field`` has no effect.
    """
    key, unnamed = f"{section}corpora", f"{section}unnamed"
    if not config.corpora:
        raise ConfigError(f"{key} is empty; name at least one text, as in --{key}=wikitext2")
    twice = sorted({name for name in config.corpora if config.corpora.count(name) > 1})
    if twice:
        raise ConfigError(f"{key}: {twice[0]} is named twice")
    found = [Corpus(_section(name, key, config.field), True, key) for name in config.corpora]
    other = _section(config.unnamed, unnamed, config.field)
    if other.path is not None and config.unnamed in config.corpora:
        raise ConfigError(f"{unnamed}: {config.unnamed} is one of the corpora; name another text")
    found.append(Corpus(other, False, unnamed))
    if config.field not in {EvaluationConfig().field, *(one.section.field for one in found)}:
        raise ConfigError(
            f"{section}field {config.field!r} has no effect: no text has columns; remove it"
        )
    return found


def counted_texts(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, num_ids: int
) -> Iterator[CountedText]:
    """Yield a text, and the other form in which this program reads it, if there is one.

    Raises:
        DataError: If it cannot be read, or is named and uses too few tokens.
    """
    section, is_named, key = corpus
    documents = read_documents(section, "calibration" if is_named else "evaluation")
    forms = [documents]
    if section.path is not None and Path(section.path).suffix.lower() == ".txt":
        # For perplexity, lines are joined with two more line feeds.
        text = read_text(Path(section.path).expanduser(), encoding="utf-8-sig")
        forms = [Documents((text,), documents.name), *([documents] if is_named else [])]
    for number, form in enumerate(forms):
        counts = count_tokens(form, tokenizer, num_ids, _NUM_FIRST)
        if is_named and counts.num_used < _LEAST_USED:
            raise DataError(
                f"{key}: {form.name} uses only {counts.num_used} different tokens, expected at "
                f"least {_LEAST_USED:,}; name a longer text"
            )
        yield CountedText(documents=form, counts=counts, is_named=is_named, is_shown=number == 0)


def check_texts(
    texts: Sequence[CountedText],
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    new_ids: Mapping[int, int],
    *,
    same_pieces: bool,
) -> None:
    """Check that a trimmed tokenizer splits named texts as before, and writes all of them.

    Args:
        texts: Texts of both kinds.
        old: The tokenizer before.
        new: The trimmed tokenizer.
        new_ids: New id of each old id that stays.
        same_pieces: Whether named texts must be split as before, or only written.

    Raises:
        ModelError: With the first text of which this is not true.
    """
    for text in texts:
        if text.is_named and same_pieces:
            found = find_other_pieces(text.documents, old, new, new_ids)
        else:
            found = find_other_text(text.documents, old, new)
        if found is not None:
            raise ModelError(f"the tokenizer cannot be trimmed: {found} would be read differently")


def _section(name: str, key: str, field: str) -> EvaluationConfig:
    source = corpus_named(name, key)
    if source.path is None or Path(name).suffix.lower() not in _COLUMNS:
        return EvaluationConfig(**asdict(source))
    return EvaluationConfig(**asdict(source), field=field)
