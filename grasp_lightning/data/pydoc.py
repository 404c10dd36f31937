"""The embedded corpus: the Python language reference, as every CPython ships it for ``help()``."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

PydocSplit = Literal["train", "test"]
PYDOC_SPLITS: tuple[PydocSplit, ...] = ("train", "test")

TEST_SHARE = 0.3
MIN_PARAGRAPH = 40
"""Characters from which on a paragraph counts: shorter ones (headings, "See also") recur."""


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs that identify a text, without white space and underlines that vary.

    Args:
        text: Paragraphs with blank lines between them.

    Returns:
        Those of at least ``MIN_PARAGRAPH`` characters, in their order.
    """
    # The same heading is underlined with another character where its topic is part of a longer one.
    parts = (re.sub(r"\n[*=~^-]+$", "", part.strip()) for part in re.split(r"\n\s*\n", text))
    normalised = (" ".join(part.split()) for part in parts)
    return [paragraph for paragraph in normalised if len(paragraph) >= MIN_PARAGRAPH]


def pydoc_documents(split: PydocSplit) -> tuple[str, ...]:
    """Return the topics of one part, one document per topic, in the order of their names.

    The text is that of the running CPython, so it differs a little between Python versions.

    Args:
        split: ``train`` for calibration, ``test`` held out: the two share no paragraph.

    Returns:
        The documents.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415  # half a megabyte, so loaded on use

    names = split_topics(topics)[split]
    return tuple(topics[name] for name in names)


def split_topics(topics: Mapping[str, str]) -> dict[PydocSplit, list[str]]:
    """Deal topics out to two parts that have no paragraph in common.

    Topics repeat each other (``compound`` holds all of ``if`` and ``while``), so what is dealt out
    is a cluster: topics connected through shared paragraphs. The largest clusters come first; a
    cluster goes to ``test`` while that holds less than ``TEST_SHARE`` of what was dealt out. Inside
    a part, a topic that only repeats longer topics is left out.

    Args:
        topics: Text by name.

    Returns:
        Names of the topics of each part, sorted.
    """
    parts: dict[PydocSplit, list[str]] = {"train": [], "test": []}
    sizes: dict[PydocSplit, int] = {"train": 0, "test": 0}
    for cluster in clusters(topics):
        dealt = sizes["train"] + sizes["test"]
        split: PydocSplit = "test" if sizes["test"] < TEST_SHARE * dealt else "train"
        parts[split].extend(cluster)
        sizes[split] += _size(topics, cluster)
    return {split: _without_repeats(topics, names) for split, names in parts.items()}


def clusters(topics: Mapping[str, str]) -> list[list[str]]:
    """Return the connected components of the topics, where a shared paragraph connects two.

    Args:
        topics: Text by name.

    Returns:
        Sorted names of each component; components by characters, descending, then by name.
    """
    root = {name: name for name in topics}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in paragraphs(topics[name]):
            root[find(name)] = find(first_with.setdefault(paragraph, name))
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(topics):
        members[find(name)].append(name)
    return sorted(members.values(), key=lambda cluster: (-_size(topics, cluster), cluster))


def _without_repeats(topics: Mapping[str, str], names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    kept = []
    for name in sorted(names, key=lambda name: (-len(topics[name]), name)):
        new = set(paragraphs(topics[name])) - seen
        if new:
            kept.append(name)
            seen |= new
    return sorted(kept)


def _size(topics: Mapping[str, str], names: Iterable[str]) -> int:
    return sum(len(topics[name]) for name in names)
