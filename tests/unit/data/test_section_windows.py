from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import CalibrationConfig, EvaluationConfig
from grasp_lightning.data.section_windows import calibration_windows, evaluation_windows
from grasp_lightning.data.windows import TokenWindows, pack_windows
from grasp_lightning.errors import ConfigError, DataError


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    """One document of 100 bytes, hence 100 tokens of the byte tokenizer."""
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(100)))
    return str(path)


@pytest.fixture
def jsonl_file(tmp_path: Path) -> str:
    """Forty documents of ten bytes."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "doc {i:03d} .."}}\n' for i in range(40)))
    return str(path)


def text_of(windows: TokenWindows, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(windows.input_ids[windows.mask]))


def test_calibration_draws_different_windows_of_the_corpus_in_order(
    tokenizer: PreTrainedTokenizerFast, text_file: str
) -> None:
    config = CalibrationConfig(source="file", path=text_file, num_samples=4, seqlen=10)
    everything = pack_windows(
        [Path(text_file).read_text()], tokenizer, seqlen=10, add_bos=False
    ).input_ids.tolist()
    drawn = calibration_windows(config, tokenizer, seed=0).input_ids.tolist()
    positions = [everything.index(row) for row in drawn]
    assert len(set(positions)) == 4
    assert positions == sorted(positions)


def test_the_seed_alone_chooses_the_calibration_windows(
    tokenizer: PreTrainedTokenizerFast, jsonl_file: str
) -> None:
    config = CalibrationConfig(source="file", path=jsonl_file, num_samples=4, seqlen=10)
    hashes = [calibration_windows(config, tokenizer, seed=seed).sha256 for seed in (0, 0, 1, 2)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_batch_size_does_not_change_the_windows(
    tokenizer: PreTrainedTokenizerFast, jsonl_file: str
) -> None:
    first, second = (
        calibration_windows(
            CalibrationConfig(
                source="file", path=jsonl_file, num_samples=4, seqlen=10, batch_size=batch_size
            ),
            tokenizer,
            seed=0,
        )
        for batch_size in (1, 3)
    )
    assert first.sha256 == second.sha256


def test_calibration_can_use_every_window_of_the_corpus(
    tokenizer: PreTrainedTokenizerFast, text_file: str
) -> None:
    config = CalibrationConfig(source="file", path=text_file, num_samples=10, seqlen=10)
    windows = calibration_windows(config, tokenizer, seed=3)
    assert text_of(windows, tokenizer) == Path(text_file).read_text()


def test_evaluation_takes_the_corpus_from_its_start(
    tokenizer: PreTrainedTokenizerFast, jsonl_file: str
) -> None:
    config = EvaluationConfig(source="file", path=jsonl_file, seqlen=16)
    everything = evaluation_windows(config, tokenizer)
    some = evaluation_windows(replace(config, num_samples=3), tokenizer)
    assert len(everything) == 25
    assert some.sha256 == everything.select(range(3)).sha256


def test_evaluation_keeps_or_drops_the_tail(
    tokenizer: PreTrainedTokenizerFast, text_file: str
) -> None:
    config = EvaluationConfig(source="file", path=text_file, seqlen=30)
    kept = evaluation_windows(config, tokenizer)
    dropped = evaluation_windows(replace(config, tail="drop"), tokenizer)
    assert (kept.num_tokens, dropped.num_tokens) == (100, 90)


def test_too_little_text_to_calibrate_says_how_much_there_is(
    tokenizer: PreTrainedTokenizerFast, text_file: str
) -> None:
    config = CalibrationConfig(source="file", path=text_file, num_samples=11, seqlen=10)
    with pytest.raises(DataError) as caught:
        calibration_windows(config, tokenizer, seed=0)
    assert str(caught.value) == (
        f"calibration: num_samples is 11, but {text_file} gives 10 windows of 10 tokens; lower "
        "calibration.num_samples or calibration.seqlen, or use a longer corpus"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 8, "seqlen": 16}, "num_samples is 8, but .* gives 7 windows of 16 tokens"),
        ({"tail": "drop", "seqlen": 101}, "at least 1 is needed, but .* gives 0 windows of 101"),
    ],
)
def test_too_little_text_to_evaluate_says_how_much_there_is(
    tokenizer: PreTrainedTokenizerFast, text_file: str, options: dict[str, Any], message: str
) -> None:
    config = EvaluationConfig(source="file", path=text_file, **options)
    with pytest.raises(DataError, match=f"^evaluation: {message}"):
        evaluation_windows(config, tokenizer)


def test_text_without_a_token_to_predict_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 4)
    config = EvaluationConfig(source="file", path=str(path), seqlen=2)
    with pytest.raises(DataError, match="has no token to predict"):
        evaluation_windows(config, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"seqlen": 1}, "seqlen must be at least 2, got 1"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ],
)
def test_numbers_out_of_range_are_named_by_key(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^calibration\.{message}"):
        calibration_windows(CalibrationConfig(source="pydoc", **options), tokenizer, seed=0)
    with pytest.raises(ConfigError, match=rf"^evaluation\.{message}"):
        evaluation_windows(EvaluationConfig(source="pydoc", **options), tokenizer)
