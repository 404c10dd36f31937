import pytest

from grasp_lightning.data.pydoc import (
    PydocSplit,
    clusters,
    paragraphs,
    pydoc_documents,
    split_topics,
)

ONE, TWO, THREE, FOUR = (f"{name} paragraph, " * 5 for name in ("One", "Two", "Three", "Four"))


def text(*parts: str) -> str:
    return "\n\n".join(parts)


def characters(documents: tuple[str, ...]) -> int:
    return sum(len(document) for document in documents)


def test_topics_connect_through_any_chain_of_shared_paragraphs() -> None:
    topics = {"a": text(ONE), "b": text(TWO, THREE), "c": text(THREE, ONE), "d": text(FOUR)}
    assert clusters(topics) == [["a", "b", "c"], ["d"]]


def test_line_breaks_and_underlines_do_not_hide_a_shared_paragraph() -> None:
    words = ONE.split()
    wrapped = " ".join(words[:4]) + "\n   " + " ".join(words[4:])
    assert paragraphs(wrapped + "\n*****") == paragraphs(ONE + "\n=====")


def test_short_paragraphs_do_not_connect_topics() -> None:
    topics = {"a": text("See also:", ONE), "b": text("See also:", TWO)}
    assert clusters(topics) == [["a"], ["b"]]


def test_a_topic_that_only_repeats_longer_ones_is_left_out() -> None:
    parts = split_topics({"whole": text(ONE, TWO), "part": text(ONE), "other": text(THREE)})
    assert parts == {"train": ["whole"], "test": ["other"]}


def test_no_paragraph_of_this_python_is_in_both_parts() -> None:
    train, test = (
        {paragraph for document in pydoc_documents(split) for paragraph in paragraphs(document)}
        for split in ("train", "test")
    )
    assert min(len(train), len(test)) > 200
    assert train.isdisjoint(test)


def test_the_held_out_part_is_about_a_third() -> None:
    train, test = characters(pydoc_documents("train")), characters(pydoc_documents("test"))
    assert 0.2 < test / (train + test) < 0.45
    assert test > 50_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_documents_are_whole_topics_without_repeats(split: PydocSplit) -> None:
    from pydoc_data.topics import topics  # noqa: PLC0415

    documents = pydoc_documents(split)
    assert set(documents) <= set(topics.values())
    assert len(set(documents)) == len(documents)
    assert pydoc_documents(split) == documents
