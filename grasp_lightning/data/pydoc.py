"""The embedded corpus: the Python language reference that every CPython ships for ``help()``."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal

PydocSplit = Literal["train", "test"]
PYDOC_SPLITS: tuple[PydocSplit, ...] = ("train", "test")

TEST_SHARE = 0.3
MIN_PARAGRAPH = 40
"""Minimum characters of a paragraph; shorter ones (headings, "See also") recur."""


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs that identify a text, without varying white space and underlines."""
    # A heading is underlined differently when its topic is part of a longer one.
    parts = (re.sub(r"\n[*=~^-]+$", "", part.strip()) for part in re.split(r"\n\s*\n", text))
    normalised = (" ".join(part.split()) for part in parts)
    return [paragraph for paragraph in normalised if len(paragraph) >= MIN_PARAGRAPH]


def pydoc_documents(split: PydocSplit) -> tuple[str, ...]:
    """Return the topics of a part as documents, sorted by name; the parts share no paragraph.

    The text comes with the running CPython, so it differs slightly between Python versions.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415  # half a megabyte, so loaded on use

    names = split_topics(topics)[split]
    return tuple(topics[name] for name in names)


def split_topics(topics: Mapping[str, str]) -> dict[PydocSplit, list[str]]:
    """Split topics into two parts that have no paragraph in common; names are sorted.

    Topics repeat each other (``compound`` contains all of ``if`` and ``while``), so whole clusters
    are assigned, largest first: to ``test`` while its share is below ``TEST_SHARE``. Within a part,
    a topic that only repeats longer topics is dropped.
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
    """Return the connected components of the topics; a shared paragraph connects two.

    Returns:
        Sorted names of each component; largest components first, by characters, then by name.
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
