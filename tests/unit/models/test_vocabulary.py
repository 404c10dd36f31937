"""Pieces of tokenizers, the choice of tokens, and rows of embeddings."""

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from grasp_lightning.errors import ConfigError, DataError, ModelError
from grasp_lightning.models.vocabulary.choice import Choice, choose_tokens
from grasp_lightning.models.vocabulary.files import trimmed_content
from grasp_lightning.models.vocabulary.pieces import Pieces, pieces_of
from grasp_lightning.models.vocabulary.rows import check_rows, special_ids, trim_rows
from tests.conftest import tiny_model


def bpe(*merges: str, characters: str = "abcd", **options: object) -> Pieces:
    results = [merge.replace(" ", "") for merge in merges]
    vocabulary = {piece: index for index, piece in enumerate([*characters, *results])}
    section = {"type": "BPE", "vocab": vocabulary, "merges": [m.split(" ") for m in merges]}
    return pieces_of({"model": {**section, **options}})


def test_a_piece_needs_the_results_of_its_own_merges() -> None:
    pieces = bpe("a b", "c d", "ab cd", "b c")
    assert set(pieces.parts("abcd")) == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    # Merges lead to ab and c instead, so no text contains it; it needs nothing.
    assert set(bpe("a b", "b c", "a bc").parts("abc")) == {"abc"}


def test_only_merges_whose_pieces_stay_are_kept() -> None:
    pieces = bpe("a b", "c d", "ab cd", "b c")
    ids = {piece: index for index, piece in enumerate(["a", "b", "c", "d", "ab", "bc"])}
    assert pieces.trimmed(ids)["merges"] == [["a", "b"], ["b", "c"]]


def test_characters_stay_unless_bytes_stand_for_them() -> None:
    assert bpe("a b").needed == {*"abcd"}
    # An unknown token that is no piece stands for nothing.
    assert bpe("a b", unk_token="<unk>").needed == {*"abcd"}
    by_byte = {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    section: dict[str, object] = {
        "type": "BPE",
        "vocab": {"a": 0, "ab": 1, **by_byte},
        "merges": [],
    }
    section |= {"byte_fallback": True, "unk_token": "ab"}
    assert pieces_of({"model": section}).needed == {"ab", *by_byte}


def test_unigram_keeps_its_worst_piece_and_the_unknown_one() -> None:
    vocabulary = [["<unk>", 0.0], ["the", -2.0], ["worst", -9.0], ["x", -3.0]]
    pieces = pieces_of({"model": {"type": "Unigram", "vocab": vocabulary, "unk_id": 0}})
    assert pieces.needed == {"<unk>", "worst", "x"}
    trimmed = pieces.trimmed({"worst": 0, "x": 1, "<unk>": 2} | {"<unk>": 0, "worst": 1, "x": 2})
    assert trimmed["vocab"] == [["<unk>", 0.0], ["worst", -9.0], ["x", -3.0]]
    assert trimmed["unk_id"] == 0


def test_spaces_come_back_where_bytes_stand_for_characters() -> None:
    by_byte = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    words = [("\u2581", -5.0), ("\u2581the", -2.0), ("z", -4.0)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *by_byte, *words], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    content = json.loads(tokenizer.to_str())
    pieces = pieces_of(content)
    counts = [0] * 260
    counts[pieces.ids["\u2581the"]] = 1
    tokens = {index: piece for piece, index in pieces.ids.items()}
    choice = choose_tokens(pieces, tokens, counts, {0}, multiple_of=1)
    small = Tokenizer.from_str(json.dumps(trimmed_content(content, choice.new_ids)))
    assert small.token_to_id("z") is None
    assert small.decode(small.encode("the z\u00e9bra").ids) == " the z\u00e9bra"


def test_tables_of_ids_are_built_once() -> None:
    unigram = {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": None}
    for pieces in (bpe("a b"), pieces_of({"model": unigram})):
        assert pieces.ids is pieces.ids
    choice = Choice(rows=(1, 0), num_used=2, num_fillers=0, keeps_all_used=True)
    assert choice.new_ids is choice.new_ids
    assert choice.new_ids == {1: 0, 0: 1}


def chosen(
    pieces: Pieces, counts: list[int], *, multiple_of: int = 1, num_tokens: int | None = None
) -> tuple[int, ...]:
    tokens = {index: piece for piece, index in pieces.ids.items()}
    return choose_tokens(
        pieces, tokens, counts, {0}, multiple_of=multiple_of, num_tokens=num_tokens
    ).rows


def test_unused_tokens_fill_up_the_number() -> None:
    pieces = bpe("a b", "c d", "ab cd", "b c")  # ids 0 to 3, 4 ab, 5 cd, 6 abcd, 7 bc
    assert chosen(pieces, [9, 0, 0, 0, 0, 1, 0, 0, 0, 0]) == (0, 1, 2, 3, 5)
    assert chosen(pieces, [9, 0, 0, 0, 0, 1, 0, 0, 0, 0], multiple_of=3) == (0, 1, 2, 3, 4, 5)
    # Longer pieces cost what they are merged from.
    assert chosen(pieces, [9, 0, 0, 0, 0, 0, 1, 5, 0, 0]) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert chosen(pieces, [9, 0, 0, 0, 0, 0, 9, 5, 0, 0], num_tokens=6) == (0, 1, 2, 3, 4, 7)


def test_a_choice_that_cannot_be_made_is_refused() -> None:
    pieces = bpe("a b", "c d")
    with pytest.raises(ConfigError, match="num_tokens is 3, but 4 tokens must stay"):
        chosen(pieces, [1] * 8, num_tokens=3)
    with pytest.raises(DataError, match="all 6 tokens would stay"):
        chosen(pieces, [1] * 6)
    # There are not 7 tokens: rows without one do not count.
    with pytest.raises(ConfigError, match="multiple_of is 7, but all 6 tokens would stay"):
        chosen(pieces, [1] + [0] * 8, multiple_of=7)


def test_rows_without_a_token_come_last() -> None:
    pieces = bpe("a b")
    tokens, counts = dict(enumerate([*"abcd", "ab"])), [1] * 5 + [0] * 4
    choice = choose_tokens(pieces, tokens, counts, {7}, multiple_of=1)
    assert choice.rows == (0, 1, 2, 3, 4, 7)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox", "phi"])
def test_logits_of_the_kept_rows_are_the_same(family: str) -> None:
    options: dict[str, Any] = {"vocab_size": 60, **IDS, **PHI.get(family, {})}
    model = tiny_model(family, **options)
    rows = [1, 2, 3, 7, 8, 20, 40, 41, 59]
    assert check_rows(model) == 60
    assert special_ids(model, 60) == {40, 2, 59}
    text = torch.tensor([[3, 7, 59, 8, 20]])
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        expected = model(text).logits[..., rows]
        trim_rows(model, rows)
        logits = model(torch.tensor([[rows.index(token) for token in text[0]]])).logits
    torch.testing.assert_close(logits, expected)
    assert (head.weight is model.get_input_embeddings().weight) == is_tied
    assert model.config.eos_token_id == [rows.index(40), rows.index(2)]
    assert model.config.pad_token_id == rows.index(59)
    assert check_rows(model) == model.config.vocab_size == len(rows)


IDS = {"bos_token_id": 2, "eos_token_id": [40, 2], "pad_token_id": 59}
PHI: dict[str, dict[str, object]] = {
    "phi": {
        "model_type": "phi",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
}


def test_other_modules_with_these_weights_are_named() -> None:
    model = tiny_model("llama")
    model.model.second = nn.Embedding(260, 32)
    model.model.second.weight = model.get_input_embeddings().weight
    with pytest.raises(ModelError, match=r"also has one row per token in model\.second; expected"):
        check_rows(model)
    model = tiny_model("llama")
    model.model.second = model.get_input_embeddings()
    with pytest.raises(ModelError, match=r"also has one row per token in model\.second; expected"):
        check_rows(model)


def test_lists_of_suppressed_tokens_are_renumbered() -> None:
    model = tiny_model("llama")
    model.generation_config.suppress_tokens = [3, 5, 257]
    trim_rows(model, [2, 5, 256, 257, 258])
    assert model.generation_config.suppress_tokens == [1, 3]


def test_padding_ids_follow_the_tokens_of_the_embedding_only() -> None:
    model = tiny_model("llama", pad_token_id=-1)  # torch takes it as the last row
    model.model.places = nn.Embedding(5, 4, padding_idx=2)
    trim_rows(model, [2, 5, 256, 257, 258])
    assert model.get_input_embeddings().padding_idx is None
    assert model.model.places.padding_idx == 2
    assert model(torch.tensor([[0, 4]])).logits.shape == (1, 2, 5)
