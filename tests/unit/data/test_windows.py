import logging
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grasp_lightning.data.windows import TokenWindows, batches, pack_windows
from grasp_lightning.errors import ConfigError

BOS, PAD = 256, 258  # of the byte tokenizer


def test_windows_run_through_documents_and_seams_are_not_targets(
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


def test_padding_is_a_window_without_a_target() -> None:
    ids = torch.arange(6).reshape(2, 3)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    padding = TokenWindows(ids, everywhere, everywhere).padding()
    assert torch.equal(padding["input_ids"], ids[:1])
    assert padding["mask"].all()
    assert not padding["targets"].any()
    assert padding["index"].shape == (0,)
