from itertools import chain
from typing import Literal, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.config import CalibrationConfig, EvaluationConfig
from grasp_lightning.data.section_windows import calibration_windows, evaluation_windows
from grasp_lightning.data.windows import TokenWindows, batches, pack_windows
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
DOCUMENTS = st.lists(st.text(max_size=20), max_size=6)
SEQLEN = st.integers(2, 9)
Tail = Literal["keep", "drop"]
TAIL = st.sampled_from(["keep", "drop"])
quick = settings(max_examples=50, deadline=None)


def token_ids(document: str) -> list[int]:
    return cast(list[int], TOKENIZER(document, add_special_tokens=False)["input_ids"])


def naive_num_targets(documents: list[str], seqlen: int, add_bos: bool, keep: bool) -> int:
    """Count the targets token by token."""
    stride = seqlen - add_bos
    stream = [
        (document, place)
        for document, text in enumerate(documents)
        for place in range(len(token_ids(text)))
    ]
    count = 0
    for start in range(0, len(stream), stride):
        window = stream[start : start + stride]
        if len(window) < stride and not keep:
            continue
        for place_in_window, (_, place_in_document) in enumerate(window):
            has_left_neighbour = add_bos or place_in_window > 0
            count += has_left_neighbour and place_in_document > 0
    return count


@quick
@given(DOCUMENTS, SEQLEN, st.booleans())
def test_windows_tile_the_tokens_exactly(documents: list[str], seqlen: int, add_bos: bool) -> None:
    windows = pack_windows(documents, TOKENIZER, seqlen=seqlen, add_bos=add_bos, tail="keep")
    stream = list(chain.from_iterable(map(token_ids, documents)))
    first = int(add_bos)
    ids, mask = windows.input_ids[:, first:], windows.mask[:, first:]
    if len(stream) % (seqlen - first) == 1 and not add_bos:
        stream = stream[:-1]  # a lone token at the end has nothing to be predicted from
    assert ids[mask].tolist() == stream
    assert (windows.input_ids[:, :first] == TOKENIZER.bos_token_id).all()
    assert windows.mask[:-1].all()


@quick
@given(DOCUMENTS, SEQLEN, st.booleans(), TAIL)
def test_targets_are_those_of_a_naive_count(
    documents: list[str], seqlen: int, add_bos: bool, tail: Tail
) -> None:
    windows = pack_windows(documents, TOKENIZER, seqlen=seqlen, add_bos=add_bos, tail=tail)
    assert windows.num_targets == naive_num_targets(documents, seqlen, add_bos, tail == "keep")
    assert not windows.targets[:, 0].any()
    assert not (windows.targets & ~windows.mask).any()


@quick
@given(DOCUMENTS, SEQLEN, st.booleans())
def test_dropping_the_tail_leaves_the_full_windows(
    documents: list[str], seqlen: int, add_bos: bool
) -> None:
    kept, dropped = (
        pack_windows(documents, TOKENIZER, seqlen=seqlen, add_bos=add_bos, tail=tail)
        for tail in ("keep", "drop")
    )
    is_full = kept.mask.all(dim=1)
    assert dropped.sha256 == kept.select(is_full.nonzero().flatten()).sha256


@quick
@given(DOCUMENTS, SEQLEN, st.booleans(), st.integers(1, 6))
def test_reading_enough_gives_the_first_of_all_windows(
    documents: list[str], seqlen: int, add_bos: bool, enough: int
) -> None:
    everything = pack_windows(documents, TOKENIZER, seqlen=seqlen, add_bos=add_bos)
    some = pack_windows(documents, TOKENIZER, seqlen=seqlen, add_bos=add_bos, enough=enough)
    assert len(some) >= min(enough, len(everything))
    full_targets = everything.select(range(len(some)))
    assert some.sha256 == full_targets.sha256


@quick
@given(st.text(min_size=4, max_size=30), SEQLEN, st.data())
def test_the_hash_sees_every_id_and_every_flag(text: str, seqlen: int, data: st.DataObject) -> None:
    windows = pack_windows([text], TOKENIZER, seqlen=seqlen, add_bos=True, tail="keep")
    again = pack_windows([text], TOKENIZER, seqlen=seqlen, add_bos=True, tail="keep")
    assert windows.sha256 == again.sha256
    position = data.draw(st.integers(0, windows.input_ids.numel() - 1))
    tensors = [windows.input_ids, windows.mask, windows.targets]
    which = data.draw(st.integers(0, 2))
    changed = tensors[which].clone()
    flat = changed.view(-1)
    flat[position] = flat[position] + 1 if which == 0 else ~flat[position]
    tensors[which] = changed
    assert TokenWindows(*tensors).sha256 != windows.sha256


def test_the_hash_sees_the_shape() -> None:
    ids, flags = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    wide = TokenWindows(ids, flags, flags)
    tall = TokenWindows(ids.view(3, 2), flags.view(3, 2), flags.view(3, 2))
    assert wide.sha256 != tall.sha256


@quick
@given(DOCUMENTS, SEQLEN, st.integers(1, 7))
def test_batches_together_are_the_windows(
    documents: list[str], seqlen: int, batch_size: int
) -> None:
    windows = pack_windows(documents, TOKENIZER, seqlen=seqlen, add_bos=False, tail="keep")
    parts = list(batches(windows, batch_size))
    assert all(len(part["index"]) == batch_size for part in parts[:-1])
    if parts:
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert joined.pop("index").tolist() == list(range(len(windows)))
        assert TokenWindows(**joined).sha256 == windows.sha256
    else:
        assert len(windows) == 0


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([64, 128, 256]), st.integers(1, 64))
def test_no_window_is_in_both_splits(seed: int, seqlen: int, num_samples: int) -> None:
    calibration = calibration_windows(
        CalibrationConfig(source="pydoc", num_samples=num_samples, seqlen=seqlen), TOKENIZER, seed
    )
    evaluation = evaluation_windows(EvaluationConfig(source="pydoc", seqlen=seqlen), TOKENIZER)
    # Lines that underline headings are the same everywhere: such a window is not text.
    rows = [
        {tuple(row) for row in part.input_ids.tolist() if len(set(row)) > 8}
        for part in (calibration, evaluation)
    ]
    assert len(calibration) == num_samples
    assert rows[0].isdisjoint(rows[1])
