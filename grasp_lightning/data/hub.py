"""Corpora on the Hugging Face hub, each pinned to one revision."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from grasp_lightning.data.files import join_rows
from grasp_lightning.errors import DataError
from grasp_lightning.models.quiet import quiet_transformers


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """A corpus on the hub, and how its rows become documents.

    Attributes:
        revision: Commit; for ``ptb`` a branch, the only revision known to be readable.
        column: Column of the text.
        is_joined: All rows form one document; otherwise each row is one.
        licence: Terms of use, as stated by the publishers.
        config: Configuration of the data set.
        files: The file of each split inside the repository, if one file is enough; None loads the
            whole split.
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
    """Return the documents of one split of a corpus, in the order of the data set."""
    corpus = HUB_CORPORA[source]
    dataset = load_from_hub(
        corpus.repository,
        f"{source} ({corpus.repository})",
        "source: file with a local path, or source: pydoc",
        name=corpus.config,
        data_files=None if corpus.files is None else {split: corpus.files[split]},
        split=split,
        revision=corpus.revision,
        # The check expects the sizes of all splits and shards, but only one file is loaded.
        verification_mode=None if corpus.files is None else "no_checks",
    )
    rows: list[str] = dataset[corpus.column][:]
    return (join_rows(rows),) if corpus.is_joined else tuple(rows)


def load_from_hub(repository: str, label: str, advice: str, **options: Any) -> Any:  # noqa: ANN401  untyped
    """Load a data set from the hub or its cache; ``label`` and ``advice`` go into messages."""
    import datasets  # noqa: PLC0415  # slow to import, so loaded on use

    try:
        with quiet_transformers(), _without_bars(datasets):
            return datasets.load_dataset(repository, **options)
    # ValueError: raised offline for a data set that is not in the cache.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{label} cannot be loaded from the Hugging Face hub: {reason}; "
            f"without internet, use {advice}"
        ) from error


@contextmanager
def _without_bars(datasets: ModuleType) -> Iterator[None]:
    """Hide the progress bars of datasets, unless the user's environment decides on them."""
    if datasets.are_progress_bars_disabled() or "HF_DATASETS_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
