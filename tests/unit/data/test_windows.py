import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import CalibrationConfig, EvaluationConfig
from grasp_lightning.data.section_windows import calibration_windows, evaluation_windows
from grasp_lightning.data.windows import TokenWindows, batches, pack_windows
from grasp_lightning.errors import ConfigError, DataError

BOS, PAD = 256, 258  # of the byte tokenizer


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


def test_windows_run_through_documents_and_seams_are_no_targets(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    windows = pack_windows(["abcde", "", "fgh", "i"], tokenizer, seqlen=3, add_bos=False)
    assert [tokenizer.decode(row) for row in windows.input_ids] == ["abc", "def", "ghi"]
    assert windows.mask.all()
    assert windows.targets.tolist() == [
        [False, True, True],
        [False, True, False],
        [False, True, False],
    ]
    assert (len(windows), windows.num_tokens, windows.num_targets) == (3, 9, 4)


def test_a_window_with_bos_holds_one_corpus_token_less(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_windows(["abcde"], tokenizer, seqlen=3, add_bos=True)
    a, b, c, d = tokenizer("abcd")["input_ids"]
    assert windows.input_ids.tolist() == [[BOS, a, b], [BOS, c, d]]
    assert windows.targets.tolist() == [[False, False, True], [False, True, True]]
    assert windows.mask.all()


def test_a_kept_tail_is_padded_and_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_windows(["abcde"], tokenizer, seqlen=3, add_bos=False, tail="keep", pad_id=PAD)
    assert windows.mask.tolist() == [[True] * 3, [True, True, False]]
    assert windows.targets.tolist() == [[False, True, True], [False, True, False]]
    assert windows.input_ids[1, 2] == PAD


@pytest.mark.parametrize(
    ("text", "add_bos", "num_windows"),
    [
        ("abcd", False, 1),
        ("abcde", False, 2),
        ("abcd", True, 2),
        ("abcde", True, 3),
        ("a", False, 0),
    ],
)
def test_a_tail_of_one_token_predicts_nothing_and_is_dropped(
    tokenizer: PreTrainedTokenizerFast, text: str, add_bos: bool, num_windows: int
) -> None:
    windows = pack_windows([text], tokenizer, seqlen=3, add_bos=add_bos, tail="keep")
    assert len(windows) == num_windows


def test_packing_reads_no_document_beyond_what_is_enough(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    read = []

    def documents() -> Iterator[str]:
        for number in range(10):
            read.append(number)
            yield "abcd"

    windows = pack_windows(documents(), tokenizer, seqlen=3, add_bos=False, enough=2)
    assert len(windows) == 2
    assert read == [0, 1, 2]


def test_a_sequence_length_below_two_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="seqlen must be at least 2, got 1"):
        pack_windows(["abc"], tokenizer, seqlen=1, add_bos=False)


def test_bos_needs_a_tokenizer_that_has_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no beginning-of-sequence token; set add_bos: false"):
        pack_windows(["abc"], tokenizer, seqlen=3, add_bos=True)


def test_a_corpus_longer_than_the_context_gives_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        tokenizer("a text that is longer")
        assert "longer than the specified maximum" in caplog.text
        caplog.clear()
        tokenizer.deprecation_warnings.clear()
        pack_windows(["a text that is longer"], tokenizer, seqlen=8, add_bos=False)
        assert caplog.text == ""
    finally:
        logger.removeHandler(caplog.handler)


def test_windows_of_unequal_shapes_are_refused() -> None:
    ids, flags = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="three tensors of one shape"):
        TokenWindows(ids, flags, flags[:1])
    with pytest.raises(ValueError, match="int64 ids and boolean mask"):
        TokenWindows(ids.int(), flags, flags)


def test_batches_keep_order_and_carry_the_index(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_windows(["abcdefghij"], tokenizer, seqlen=2, add_bos=False)
    parts = list(batches(windows, 2))
    assert [part["index"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert {key: tuple(value.shape) for key, value in parts[0].items()} == {
        "input_ids": (2, 2),
        "mask": (2, 2),
        "targets": (2, 2),
        "index": (2,),
    }


def test_a_batch_size_below_one_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = pack_windows(["abcd"], tokenizer, seqlen=2, add_bos=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(batches(windows, 0))


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


def test_padding_is_a_window_without_a_target() -> None:
    ids = torch.arange(6).reshape(2, 3)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    padding = TokenWindows(ids, everywhere, everywhere).padding()
    assert torch.equal(padding["input_ids"], ids[:1])
    assert padding["mask"].all()
    assert not padding["targets"].any()
    assert padding["index"].shape == (0,)
