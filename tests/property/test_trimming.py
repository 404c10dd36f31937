"""Trimmed tokenizers on any text."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from grasp_lightning.models.vocabulary.choice import choose_tokens
from grasp_lightning.models.vocabulary.files import processor_tokens, trimmed_content
from grasp_lightning.models.vocabulary.pieces import pieces_of
from tests.integration.trimming import KINDS, corpus, trained

CASES = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
WORDS = corpus().split()[:400]


def trimmed(kind: str, text: str) -> tuple[Tokenizer, dict[int, int]]:
    """Return the tokenizer trimmed to a text, and its id of each old id."""
    content = json.loads(trained(kind))
    pieces = pieces_of(content)
    tokens = {index: piece for piece, index in pieces.ids.items()}
    tokens |= {token["id"]: token["content"] for token in content["added_tokens"]}
    counts = [0] * (len(tokens) + 9)
    for token in original(kind).encode(text, add_special_tokens=False).ids:
        counts[token] += 1
    choice = choose_tokens(pieces, tokens, counts, processor_tokens(content), multiple_of=1)
    new = trimmed_content(content, choice.new_ids)
    return Tokenizer.from_str(json.dumps(new)), dict(choice.new_ids)


@cache
def original(kind: str) -> Tokenizer:
    return Tokenizer.from_str(trained(kind))


@cache
def trimmed_once(kind: str) -> Tokenizer:
    return trimmed(kind, corpus()[:2000])[0]


@pytest.mark.parametrize("kind", CASES)
@settings(deadline=None, max_examples=25)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=40))
def test_a_text_keeps_its_pieces(kind: str, words: list[str]) -> None:
    text = " ".join(words)
    small, ids = trimmed(kind, text)
    before = original(kind).encode(text)
    after = small.encode(text)
    assert after.tokens == before.tokens
    assert after.ids == [ids[old] for old in before.ids]


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_a_byte_level_tokenizer(text: str) -> None:
    small = trimmed_once("byte_level")
    assert small.decode(small.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("kind", CASES)
@settings(deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=20))
def test_other_text_is_decoded_as_before(kind: str, words: list[str]) -> None:
    text = " ".join(words)
    found = [
        one.decode(one.encode(text, add_special_tokens=False).ids)
        for one in (original(kind), trimmed_once(kind))
    ]
    assert found[0] == found[1]
