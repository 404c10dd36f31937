import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grasp_lightning.config import CalibrationConfig, EvaluationConfig
from grasp_lightning.data import hub
from grasp_lightning.data.mixture import mixture_parts
from grasp_lightning.data.pydoc import pydoc_documents
from grasp_lightning.data.sources import Documents, read_documents
from grasp_lightning.errors import ConfigError, DataError


def read_calibration(config: CalibrationConfig) -> Documents:
    (corpus,) = mixture_parts(config, "calibration")
    return read_documents(corpus, "calibration")


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text("Some text.\n")
    return str(path)


def test_pydoc_calibrates_on_train_and_evaluates_on_test() -> None:
    calibration = read_calibration(CalibrationConfig(source="pydoc"))
    evaluation = read_documents(EvaluationConfig(source="pydoc"), "evaluation")
    assert calibration.texts == pydoc_documents("train")
    assert evaluation.texts == pydoc_documents("test")
    assert (calibration.name, evaluation.name) == ("pydoc (train)", "pydoc (test)")


def test_a_split_that_is_asked_for_replaces_the_default() -> None:
    config = CalibrationConfig(source="pydoc", split="test")
    assert read_calibration(config).texts == pydoc_documents("test")


def test_a_file_is_read_from_its_path(text_file: str) -> None:
    documents = read_calibration(CalibrationConfig(source="file", path=text_file))
    assert documents.texts == ("Some text.\n",)
    assert documents.name == text_file


def test_a_tilde_in_a_path_is_the_home_folder(
    text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(text_file).parent))
    config = CalibrationConfig(source="file", path="~/a.txt")
    assert read_calibration(config).texts == ("Some text.\n",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": "wiki"},
            "calibration.source 'wiki' is unknown; expected one of pydoc, wikitext2, c4, ptb, file",
        ),
        ({"source": "file"}, "calibration.source file needs calibration.path"),
        ({"source": "pydoc", "path": "a.txt"}, "calibration.path 'a.txt' has no effect"),
        ({"source": "c4", "path": "a.txt"}, "calibration.path 'a.txt' has no effect"),
        (
            {"source": "file", "path": "a.txt", "split": "train"},
            "calibration.split 'train' has no effect with calibration.source file",
        ),
        (
            {"source": "pydoc", "split": "dev"},
            "calibration.split 'dev' is unknown; pydoc has: train, test",
        ),
        (
            {"source": "wikitext2", "split": "dev"},
            "calibration.split 'dev' is unknown; wikitext2 has: train, validation, test",
        ),
        ({"source": "pydoc", "field": "body"}, "calibration.field 'body' has no effect"),
        (
            {"source": "file", "path": "a.txt", "field": "body"},
            "calibration.field 'body' has no effect: a .txt file has no columns",
        ),
    ],
)
def test_keys_that_cannot_be_followed_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_calibration(CalibrationConfig(**options))


def test_messages_name_the_section_that_asked() -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.source 'wiki'"):
        read_documents(EvaluationConfig(source="wiki"), "evaluation")


@pytest.mark.skipif(not datasets.config.HF_HUB_OFFLINE, reason="HF_HUB_OFFLINE is not set")
@pytest.mark.parametrize("source", sorted(hub.HUB_CORPORA))
def test_without_internet_a_hub_corpus_gives_one_line_that_says_what_to_do(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # this machine may have it
    with pytest.raises(DataError) as caught:
        read_documents(EvaluationConfig(source=source), "evaluation")
    line = str(caught.value)
    assert line.startswith(f"{source} ({hub.HUB_CORPORA[source].repository}) cannot be loaded")
    assert line.endswith("use source: file with a local path, or source: pydoc")
    assert "\n" not in line


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders laid out as the repositories on the hub, read by the real ``load_dataset``."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for source, corpus in hub.HUB_CORPORA.items():
        folder = tmp_path / source
        for split, name in (corpus.files or {}).items():
            _write_rows(folder / name, corpus.column, [f"{split} 0", f"{split} 1"])
        monkeypatch.setitem(hub.HUB_CORPORA, source, replace(corpus, repository=str(folder)))
    wikitext = tmp_path / "wikitext2"
    for split in hub.HUB_CORPORA["wikitext2"].splits:
        name = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        _write_rows(wikitext / name, "text", [f" = {split} = \n", ""])
    (wikitext / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n"
            for split in hub.HUB_CORPORA["wikitext2"].splits
        )
        + "---\n"
    )


def _write_rows(path: Path, column: str, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: rows}), path)
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({column: row}) + "\n" for row in rows)


@pytest.mark.usefixtures("local_hub")
@pytest.mark.parametrize(
    ("source", "calibration", "evaluation"),
    [
        ("wikitext2", (" = train = \n\n\n",), (" = test = \n\n\n",)),
        ("c4", ("train 0", "train 1"), ("validation 0", "validation 1")),
        ("ptb", ("train 0\n\ntrain 1",), ("test 0\n\ntest 1",)),
    ],
)
def test_rows_of_a_hub_corpus_become_documents(
    source: str, calibration: tuple[str, ...], evaluation: tuple[str, ...]
) -> None:
    assert read_calibration(CalibrationConfig(source=source)).texts == calibration
    assert read_documents(EvaluationConfig(source=source), "evaluation").texts == evaluation


def test_every_hub_corpus_has_its_default_splits() -> None:
    for corpus in hub.HUB_CORPORA.values():
        assert {corpus.calibration_split, corpus.evaluation_split} <= set(corpus.splits)
        assert corpus.files is None or set(corpus.files) == set(corpus.splits)
        assert corpus.calibration_split != corpus.evaluation_split


@pytest.mark.network
def test_wikitext_loads_from_the_hub() -> None:
    (text,) = read_documents(EvaluationConfig(source="wikitext2"), "evaluation").texts
    assert "Robert Boulter" in text
    assert 1_250_000 < len(text) < 1_330_000


@pytest.mark.network
def test_ptb_loads_from_the_hub() -> None:
    (text,) = read_documents(EvaluationConfig(source="ptb"), "evaluation").texts
    assert len(text.split("\n\n")) == 3761


def test_a_file_without_text_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_documents(EvaluationConfig(source="file", path=str(tmp_path / "a.txt")), "evaluation")
