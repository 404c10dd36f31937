"""Corpora on the Hugging Face hub, each pinned to one revision."""

from collections.abc import Mapping
from dataclasses import dataclass

from grasp_lightning.data.files import join_rows
from grasp_lightning.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """Where a corpus lies on the hub, and how its rows become documents.

    Attributes:
        repository: Name of the data set.
        revision: Commit; of ``ptb`` a branch, since only that is known to be readable.
        column: Column that holds the text.
        is_joined: All rows are one document; else each row is one.
        splits: Parts that can be asked for.
        calibration_split: Part to calibrate on.
        evaluation_split: Held-out part.
        licence: Conditions of use, as its publishers state them.
        config: Configuration of the data set.
        files: File of each split inside the repository, for data sets of which one file is
            enough; None loads the whole split.
    """

    repository: str
    revision: str
    column: str
    is_joined: bool
    splits: tuple[str, ...]
    calibration_split: str
    evaluation_split: str
    licence: str
    config: str | None = None
    files: Mapping[str, str] | None = None


HUB_CORPORA: dict[str, HubCorpus] = {
    "wikitext2": HubCorpus(
        repository="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        column="text",
        is_joined=True,
        splits=("train", "validation", "test"),
        calibration_split="train",
        evaluation_split="test",
        licence="CC BY-SA 3.0 and GFDL",
    ),
    # One shard of 1024 and of 8: 356 thousand and 46 thousand documents.
    "c4": HubCorpus(
        repository="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        column="text",
        is_joined=False,
        splits=("train", "validation"),
        calibration_split="train",
        evaluation_split="validation",
        licence="ODC-By 1.0, and the terms of use of Common Crawl",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # The data set itself is a script, which datasets 4 refuses; this ref is the hub's own parquet
    # conversion of it, frozen since the hub stopped converting scripts.
    "ptb": HubCorpus(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        column="sentence",
        is_joined=True,
        splits=("train", "validation", "test"),
        calibration_split="train",
        evaluation_split="test",
        licence="LDC User Agreement for Non-Members",
        files={
            "train": "penn_treebank/train/0000.parquet",
            "validation": "penn_treebank/validation/0000.parquet",
            "test": "penn_treebank/test/0000.parquet",
        },
    ),
}


def hub_documents(source: str, split: str) -> tuple[str, ...]:
    """Return the documents of one part of a corpus, from the hub or its local cache.

    Args:
        source: Key of ``HUB_CORPORA``.
        split: One of the corpus' splits.

    Returns:
        The documents, in the order of the data set.

    Raises:
        DataError: If the data set can be reached neither on the hub nor in the cache.
    """
    import datasets  # noqa: PLC0415  # slow to import, so loaded on use

    corpus = HUB_CORPORA[source]
    try:
        dataset = datasets.load_dataset(
            corpus.repository,
            corpus.config,
            data_files=None if corpus.files is None else {split: corpus.files[split]},
            split=split,
            revision=corpus.revision,
            # The check compares with the sizes of all splits and shards, and we ask for one file.
            verification_mode=None if corpus.files is None else "no_checks",
        )
    # ValueError: what the library raises offline for a data set that is not in its cache.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{source} ({corpus.repository}) cannot be loaded from the Hugging Face hub: {reason}; "
            "without internet, use source: file with a local path, or source: pydoc"
        ) from error
    rows: list[str] = dataset[corpus.column][:]
    return (join_rows(rows),) if corpus.is_joined else tuple(rows)
