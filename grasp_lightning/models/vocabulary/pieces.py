"""The pieces of a tokenizer, and what each of them needs in order to be found in a text.

Removing pieces must not change how a text is split whose pieces stay:

- BPE applies the merge of the lowest rank, again and again. The merges inside a piece do not depend
  on the text around it, so a piece needs the results of its own merges, and these only. A removed
  merge was never applied in such a text, and all others keep their order.
- Unigram takes the best split among all. Unknown characters cost more than the worst piece does, so
  the worst piece stays, too.
- WordPiece takes the longest piece that fits. With single characters kept, a removed piece is never
  followed by a shorter one.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any, Final

from grasp_lightning.errors import ModelError

Json = dict[str, Any]  # Any: values of JSON
_BYTE: Final = re.compile("<0x[0-9A-Fa-f]{2}>")
_NUM_BYTES: Final = 256
_SPACE: Final = "\u2581"  # decoders write a space for this character, but not for its bytes


class Pieces(ABC):
    """The section ``model`` of a tokenizer.json.

    Args:
        section: Its content.
    """

    def __init__(self, section: Json) -> None:
        self._section = section

    @property
    @abstractmethod
    def ids(self) -> Mapping[str, int]:
        """Id of every piece."""

    @property
    def needed(self) -> frozenset[str]:
        """Pieces without which some text could not be written: characters, bytes, the unknown one.

        Where bytes stand for characters that are no pieces, all but that of a space may be removed.
        """
        bytes_ = {piece for piece in self.ids if _BYTE.fullmatch(piece)}
        has_bytes = bool(self._section.get("byte_fallback")) and len(bytes_) == _NUM_BYTES
        characters = (
            self.ids.keys() & {_SPACE} if has_bytes else filter(self._is_character, self.ids)
        )
        return frozenset({*bytes_, *characters, *self._unknown()})

    def parts(self, piece: str) -> Collection[str]:
        """Return the pieces that must stay so that a piece can be found, with the piece."""
        return (piece,)

    @abstractmethod
    def trimmed(self, ids: Mapping[str, int]) -> Json:
        """Return the section with some of the pieces, by their new ids, which ascend from 0."""

    def _is_character(self, piece: str) -> bool:
        return len(piece) == 1

    def _unknown(self) -> Iterable[str]:
        unknown = self._section.get("unk_token")
        return () if unknown is None or unknown not in self.ids else (unknown,)


class BpePieces(Pieces):
    """Pieces by merges: byte-level, or characters with or without bytes for unknown ones."""

    def __init__(self, section: Json) -> None:
        super().__init__(section)
        self._merges = [_pair(merge) for merge in section["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}

    @property
    def ids(self) -> Mapping[str, int]:
        """Id of every piece."""
        ids: Mapping[str, int] = self._section["vocab"]
        return ids

    def parts(self, piece: str) -> Collection[str]:
        """Return a piece with the results of its merges; alone if merges do not lead to it."""
        symbols = list(piece)
        found = {piece, *symbols}
        while True:
            ranked = (
                (rank, place)
                for place, pair in enumerate(pairwise(symbols))
                if (rank := self._ranks.get(pair)) is not None
            )
            best = min(ranked, default=None)
            if best is None:
                return found if symbols == [piece] else (piece,)
            place = best[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            found.add(symbols[place])

    def trimmed(self, ids: Mapping[str, int]) -> Json:
        """Return the section with the merges whose parts and result stay."""
        merges = [
            [left, right]
            for left, right in self._merges
            if left in ids and right in ids and left + right in ids
        ]
        return {**self._section, "vocab": dict(ids), "merges": merges}


class UnigramPieces(Pieces):
    """Pieces by scores."""

    def __init__(self, section: Json) -> None:
        super().__init__(section)
        self._ids = {piece: index for index, (piece, _) in enumerate(section["vocab"])}

    @property
    def ids(self) -> Mapping[str, int]:
        """Id of every piece."""
        return self._ids

    def trimmed(self, ids: Mapping[str, int]) -> Json:
        """Return the section with the scores of the pieces."""
        vocabulary = [entry for entry in self._section["vocab"] if entry[0] in ids]
        unknown = next(iter(self._unknown_piece()), None)
        return {
            **self._section,
            "vocab": vocabulary,
            "unk_id": None if unknown is None else ids[unknown],
        }

    def _unknown(self) -> Iterable[str]:
        worst, _ = min(self._section["vocab"], key=lambda entry: entry[1])
        return (worst, *self._unknown_piece())

    def _unknown_piece(self) -> Iterable[str]:
        unknown = self._section.get("unk_id")
        return () if unknown is None else (self._section["vocab"][unknown][0],)


class WordPieces(Pieces):
    """Pieces by length: the longest first."""

    @property
    def ids(self) -> Mapping[str, int]:
        """Id of every piece."""
        ids: Mapping[str, int] = self._section["vocab"]
        return ids

    def trimmed(self, ids: Mapping[str, int]) -> Json:
        """Return the section with some of the pieces."""
        return {**self._section, "vocab": dict(ids)}

    def _is_character(self, piece: str) -> bool:
        return len(piece.removeprefix(self._section["continuing_subword_prefix"])) == 1


_KINDS: Final = {"BPE": BpePieces, "Unigram": UnigramPieces, "WordPiece": WordPieces}
# Options of BPE with which pieces are not the text of their parts, or are drawn at random.
_ODD: Final = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")


def pieces_of(content: Json) -> Pieces:
    """Return the pieces of a tokenizer.

    Args:
        content: Content of its tokenizer.json.

    Raises:
        ModelError: If it is of a kind that cannot be trimmed.
    """
    section = content["model"]
    kind = section.get("type")
    if kind not in _KINDS:
        raise ModelError(
            f"the tokenizer is of type {kind}, which cannot be trimmed; expected one of "
            f"{', '.join(_KINDS)}"
        )
    odd = next((key for key in _ODD if kind == "BPE" and section.get(key)), None)
    if odd is not None:
        raise ModelError(
            f"the tokenizer has {odd} {section[odd]!r}, with which it cannot be trimmed; expected "
            "byte-level BPE, or BPE of characters"
        )
    build: Callable[[Json], Pieces] = _KINDS[kind]
    return build(section)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
