import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import CalibrationConfig, EvaluationConfig
from grasp_lightning.data.mixture import (
    CALIBRATION_SOURCES,
    interleaved,
    mixture_parts,
    shares,
)
from grasp_lightning.data.rows import RowRange
from grasp_lightning.data.section_windows import calibration_windows, evaluation_windows
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, DataError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a .jsonl file of documents that are one letter ten times."""

    def write(name: str, letters: str, field: str = "text") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({field: letter * 10}) + "\n" for letter in letters))
        return str(path)

    return write


def origins(windows: TokenWindows, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(row))[:1] for row in windows.input_ids]


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1, 1], [5, 5]),
        (10, [0.7, 0.3], [7, 3]),
        (3, [0.1, 0.1, 0.1], [1, 1, 1]),
        (10, [1, 1, 1], [4, 3, 3]),
        (7, [5, 3, 1], [4, 2, 1]),
        (512, [2, 1, 1], [256, 128, 128]),
        (4, [1e-9, 1e9], [0, 4]),
    ],
)
def test_shares_are_the_quotas_by_largest_remainder(
    total: int, weights: list[float], expected: list[int]
) -> None:
    assert shares(total, weights) == expected


def test_shares_sum_up_and_are_less_than_one_away_from_the_quota() -> None:
    generator = torch.Generator().manual_seed(0)
    for total in range(1, 60):
        weights = (torch.rand(total % 5 + 1, generator=generator) + 0.01).tolist()
        counts = shares(total, weights)
        assert sum(counts) == total
        whole = sum(map(Fraction, weights))
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - total * Fraction(weight) / whole) < 1


def test_every_beginning_of_a_mixture_is_about_a_fair_one() -> None:
    counts = [256, 128, 100, 28]
    order = interleaved(counts)
    assert sorted(order) == list(range(512))
    origin = [next(i for i in range(4) if index < sum(counts[: i + 1])) for index in order]
    for length in range(1, 513):
        for index, count in enumerate(counts):
            assert abs(origin[:length].count(index) - length * count / 512) < 2
    for index in range(4):  # each source keeps its own order
        own = [place for place, source in zip(order, origin, strict=True) if source == index]
        assert own == sorted(own)


def test_a_mixture_holds_what_each_source_gives_alone(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    first, second = write("a.jsonl", "a" * 40), write("b.jsonl", "bcdefgh" * 8)
    mixed = CalibrationConfig(
        source=("file", "file", "pydoc"),
        path=(first, second),
        weights=(3, 2, 1),
        num_samples=12,
        seqlen=10,
    )
    windows = calibration_windows(mixed, tokenizer, seed=5)
    found = [row.tolist() for row in windows.input_ids]
    alone = [
        CalibrationConfig(source="file", path=first, num_samples=6, seqlen=10),
        CalibrationConfig(source="file", path=second, num_samples=4, seqlen=10),
        CalibrationConfig(source="pydoc", num_samples=2, seqlen=10),
    ]
    for config in alone:
        rows = calibration_windows(config, tokenizer, seed=5).input_ids.tolist()
        places = [found.index(row) for row in rows if rows.count(row) == 1]
        assert places == sorted(places)
        assert all(found.count(row) == rows.count(row) for row in rows)
    assert origins(windows, tokenizer).count("a") >= 6
    assert len(windows) == 12


def test_the_seed_alone_chooses_the_windows_of_a_mixture(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("b.jsonl", "bcdefgh" * 20)
    config = CalibrationConfig(source=("pydoc", "file"), path=path, num_samples=8, seqlen=10)
    hashes = [calibration_windows(config, tokenizer, seed=seed).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    other = replace(config, weights=(3.0, 1.0))
    assert calibration_windows(other, tokenizer, seed=0).sha256 != hashes[0]
    equal = replace(config, weights=(7.0, 7.0), batch_size=3)
    assert calibration_windows(equal, tokenizer, seed=0).sha256 == hashes[0]


def test_a_list_of_one_source_is_that_source(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("b.jsonl", "bcdefgh" * 20)
    single = CalibrationConfig(source="file", path=path, num_samples=8, seqlen=10)
    listed = replace(single, source=("file",), path=(path,))
    hashes = {calibration_windows(config, tokenizer, 0).sha256 for config in (single, listed)}
    assert len(hashes) == 1


# Recorded before there were mixtures: single sources must always give these windows.
def test_a_single_source_gives_the_windows_of_before(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("b.jsonl", "bcdefgh" * 20)
    config = CalibrationConfig(source="file", path=path, num_samples=8, seqlen=10)
    assert calibration_windows(config, tokenizer, seed=3).sha256 == SINGLE


SINGLE = "f496846d6307f06d537ad72fb2bd65f0a8145c299062808d7d5af689741ab685"


def test_rows_split_one_file_between_calibration_and_evaluation(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("a.jsonl", "abcdefghij")
    calibration = calibration_windows(
        CalibrationConfig(source="file", path=path, rows="0-5", num_samples=6, seqlen=10),
        tokenizer,
        seed=0,
    )
    evaluation = evaluation_windows(
        EvaluationConfig(source="file", path=path, rows="6-9", seqlen=10), tokenizer
    )
    assert sorted(origins(calibration, tokenizer)) == [*"abcdef"]
    assert origins(evaluation, tokenizer) == [*"ghij"]
    rest = EvaluationConfig(source="file", path=path, rows="6-", seqlen=10)
    assert evaluation_windows(rest, tokenizer).sha256 == evaluation.sha256


def test_ranges_of_one_file_are_two_sources(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("a.jsonl", "abcdefghij")
    config = CalibrationConfig(
        source=("file", "file"),
        path=(path, path),
        rows=("0-1", "8-9"),
        num_samples=4,
        seqlen=10,
    )
    drawn = origins(calibration_windows(config, tokenizer, seed=0), tokenizer)
    assert sorted(drawn) == [*"abij"]
    assert {*drawn[:2]} & {*"ab"}
    assert {*drawn[:2]} & {*"ij"}


def test_the_real_text_is_split_by_rows(
    tokenizer: PreTrainedTokenizerFast, grasp_data: Path
) -> None:
    path = str(grasp_data / "c4" / "realnewslike_validation_sample.jsonl")
    first = CalibrationConfig(source="file", path=path, rows="0-259", num_samples=16, seqlen=64)
    texts = {
        rows: calibration_windows(replace(first, rows=rows), tokenizer, seed=0).input_ids.tolist()
        for rows in ("0-259", "260-519", "260-")
    }
    assert texts["260-519"] == texts["260-"]
    assert not {tuple(row) for row in texts["0-259"]} & {tuple(row) for row in texts["260-519"]}


def test_field_and_split_reach_the_sources_that_have_them(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    config = CalibrationConfig(
        source=("file", "wikitext2", "file", "self"),
        path=(str(tmp_path / "a.txt"), write("b.jsonl", "b", field="body")),
        split="train",
        field="body",
    )
    parts = mixture_parts(config, "calibration")
    assert [part.split for part in parts] == [None, "train", None, None]
    assert [part.field for part in parts] == ["text", "text", "body", "text"]
    assert [part.num_samples for part in parts] == [128] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"source": ()},
            "calibration.source is an empty list; name at least one of pydoc, wikitext2, c4, ptb,",
        ),
        (
            {"source": ("pydoc", "moon")},
            "calibration.source 'moon' is unknown; expected one of pydoc, wikitext2, c4, ptb,",
        ),
        (
            {"source": "pydoc", "weights": (1.0,)},
            "calibration.weights has no effect with one calibration.source; remove it",
        ),
        (
            {"source": ("pydoc", "c4"), "weights": (1.0, 2.0, 3.0)},
            "calibration.weights has 3 numbers, but calibration.source has 2 names: pydoc, c4;",
        ),
        (
            {"source": ("pydoc", "c4"), "weights": (1.0, 0.0)},
            "calibration.weights must be above 0, got 0.0",
        ),
        (
            {"source": ("pydoc", "c4"), "weights": (float("nan"), 1.0)},
            "calibration.weights must be above 0, got nan",
        ),
        (
            {"source": ("pydoc", "c4"), "weights": (float("inf"), 1.0)},
            "calibration.weights must be above 0, got inf",
        ),
        (
            {"source": ("pydoc", "c4", "ptb"), "num_samples": 2},
            "calibration.num_samples is 2, fewer than the 3 names in calibration.source",
        ),
        (
            {"source": ("pydoc", "c4"), "weights": (100.0, 1.0), "num_samples": 10},
            "calibration.weights give c4 none of the 10 windows; raise its weight or",
        ),
        (
            {"source": ("file", "pydoc", "file"), "path": "a.jsonl"},
            "calibration.path must have one value for each of file, file in calibration.source, in",
        ),
        (
            {"source": ("file", "instructions"), "path": ("a.jsonl", "b.json"), "rows": "0-3"},
            "calibration.rows must have one value for each of file, instructions in",
        ),
        (
            {"source": "file", "path": ("a.jsonl", "b.jsonl")},
            "calibration.path must have one value for one source, got 2",
        ),
        (
            {"source": ("pydoc", "file")},
            "calibration.source file needs calibration.path, the file to read",
        ),
        (
            {"source": "instructions"},
            "calibration.source instructions needs calibration.path",
        ),
        (
            {"source": ("pydoc", "self"), "path": "a.txt"},
            "calibration.path 'a.txt' has no effect with calibration.source pydoc, self; remove it",
        ),
        (
            {"source": "self", "rows": "0-3"},
            "calibration.rows '0-3' has no effect with calibration.source self; remove it",
        ),
        (
            {"source": ("alpaca", "self"), "split": "train"},
            "calibration.split 'train' has no effect with calibration.source alpaca, self",
        ),
        (
            {"source": ("file", "self"), "path": "a.txt", "field": "body"},
            "calibration.field 'body' has no effect with calibration.source file, self",
        ),
        ({"source": ("pydoc", "pydoc")}, "calibration.source names pydoc twice; name each"),
        (
            {"source": ("file", "file"), "path": ("/a/b.jsonl", "/a/../a/b.jsonl")},
            "calibration.source names /a/b.jsonl twice; name each",
        ),
        (
            {
                "source": ("file", "file"),
                "path": ("/a/b.jsonl", "/a/b.jsonl"),
                "rows": ("0-3", "3-"),
            },
            "calibration.source names /a/b.jsonl twice, with rows 0-3 and 3-; name each",
        ),
    ],
)
def test_keys_of_a_mixture_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        mixture_parts(CalibrationConfig(**options), "calibration")


def test_every_source_can_be_mixed() -> None:
    config = CalibrationConfig(source=CALIBRATION_SOURCES, path=("a.jsonl", "b.jsonl"))
    parts = mixture_parts(config, "calibration")
    assert tuple(part.source for part in parts) == CALIBRATION_SOURCES
    assert sum(part.num_samples for part in parts) == 512


@pytest.mark.parametrize("text", ["", "5", "-5", "5-3", "a-b", "0-5-7", "0 - 5", "[0, 5]", "0-5\n"])
def test_text_that_is_not_a_range_of_rows_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^calibration\.rows"):
        RowRange.parse(text, "calibration.rows")


@pytest.mark.parametrize(
    ("first", "second", "shares_a_row"),
    [
        ("0-3", "4-5", False),
        ("0-3", "3-5", True),
        ("4-5", "0-3", False),
        ("4-", "0-3", False),
        ("3-", "0-3", True),
        ("3-", "9-", True),
        ("0-9", "3-4", True),
    ],
)
def test_ranges_overlap_where_they_share_a_row(first: str, second: str, shares_a_row: bool) -> None:
    one, other = (RowRange.parse(text, "rows") for text in (first, second))
    assert one.overlaps(other) == other.overlaps(one) == shares_a_row


@pytest.mark.parametrize("rows", ["0-10", "10-", "10-12", "99-"])
def test_rows_out_of_range_say_how_many_there_are(
    rows: str, tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("a.jsonl", "abcdefghij")
    config = EvaluationConfig(source="file", path=path, rows=rows, seqlen=4)
    with pytest.raises(DataError) as caught:
        evaluation_windows(config, tokenizer)
    assert str(caught.value) == (
        f"evaluation.rows {rows} is out of range: {path} has 10 rows, counted from 0"
    )


def test_rows_without_effect_or_text_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": " "}\n')
    text = EvaluationConfig(source="file", path=str(tmp_path / "a.txt"), rows="0-0", seqlen=4)
    with pytest.raises(ConfigError, match=r"evaluation\.rows 0-0 has no effect: .* one document"):
        evaluation_windows(text, tokenizer)
    pydoc = EvaluationConfig(source="pydoc", rows="0-3")
    with pytest.raises(ConfigError, match=r"evaluation\.rows 0-3 has no effect with"):
        evaluation_windows(pydoc, tokenizer)
    blank = replace(text, path=str(tmp_path / "a.jsonl"), rows="1-1")
    with pytest.raises(DataError, match=r"rows 1-1 of .* have no text"):
        evaluation_windows(blank, tokenizer)


def test_too_short_a_source_says_how_many_windows_it_owes(
    tokenizer: PreTrainedTokenizerFast, write: Write
) -> None:
    path = write("a.jsonl", "abc")
    config = CalibrationConfig(source=("pydoc", "file"), path=path, num_samples=8, seqlen=10)
    with pytest.raises(DataError) as caught:
        calibration_windows(config, tokenizer, seed=0)
    assert str(caught.value).startswith(
        f"calibration: num_samples is 8, 4 of file, but {path} gives 3 windows of 10 tokens"
    )
