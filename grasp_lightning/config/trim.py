"""Configuration of a smaller vocabulary, and of ``trim``."""

from dataclasses import dataclass

from grasp_lightning.config.common import ModelConfig
from grasp_lightning.config.values import Count, PathName


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """How tokens are counted, and how many stay.

    Attributes:
        field: Text column of .jsonl and .parquet files.
        unnamed: Another text, for which the report shows how much longer it becomes; for a named
            corpus, its held-out split.
        multiple_of: The number of tokens is rounded up to a multiple of this, with unused tokens.
        num_tokens: About how many tokens to keep, the most frequent ones; text then becomes longer.
            Unset: all that the corpora use.
    """

    field: str = "text"
    unnamed: PathName = "pydoc"
    multiple_of: Count = 64
    num_tokens: Count | None = None


@dataclass(frozen=True, kw_only=True)
class TokensConfig(VocabularySettings):
    """The texts of ``method.vocabulary: corpus``, and of ``method.embeddings: factors``.

    Attributes:
        corpora: Texts whose tokens stay: wikitext2, ptb, c4, pydoc (their calibration splits), or
            .txt, .jsonl or .parquet files. Also, how often they use each token smooths the counts
            of the calibration text, for embeddings factors.
    """

    corpora: tuple[PathName, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrimConfig(VocabularySettings):
    """Remove tokens that some texts never use, with their rows in embedding and head.

    Attributes:
        model: Model to trim, compressed or not.
        corpora: Texts whose tokens stay: wikitext2, ptb, c4, pydoc (their calibration splits), or
            .txt, .jsonl or .parquet files.
        output_dir: Run folder to write; the model is in its subfolder ``model``.
        overwrite: Delete what an earlier run wrote there.
    """

    model: ModelConfig
    corpora: tuple[PathName, ...]
    output_dir: PathName
    overwrite: bool = False
