"""Which tokens of a vocabulary stay."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from grasp_lightning.errors import ConfigError, DataError
from grasp_lightning.models.vocabulary.pieces import Pieces


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The tokens that stay.

    Attributes:
        rows: Old id of each new id; old ids ascend, those without a token come last.
        num_used: How many of them the text uses.
        num_fillers: How many the text does not use, and only fill up the number.
        keeps_all_used: Whether every token that the text uses stays.
    """

    rows: tuple[int, ...]
    num_used: int
    num_fillers: int
    keeps_all_used: bool

    @cached_property
    def new_ids(self) -> Mapping[int, int]:
        """New id by old id."""
        return {old: new for new, old in enumerate(self.rows)}


def choose_tokens(
    pieces: Pieces,
    tokens: Mapping[int, str],
    counts: Sequence[int],
    protected: Collection[int],
    *,
    multiple_of: int,
    num_tokens: int | None = None,
    section: str = "",
) -> Choice:
    """Choose what stays: the protected tokens, those in use, and all that these need.

    The number is filled up to a multiple with tokens that are not used, lowest ids first, so no row
    is without a token. Lower ids are the more frequent ones in most vocabularies.

    Args:
        tokens: Text of every token by its id, with the added ones.
        counts: How often the text uses each id.
        protected: Ids that stay in any case, also of rows without a token.
        multiple_of: The number of tokens becomes a multiple of this.
        num_tokens: Keep about this many, the most frequent; None keeps all that are used.
        section: Prefix of the keys in messages.

    Raises:
        ConfigError: If ``num_tokens`` is less than what must stay, or there are too few tokens for
            a multiple.
        DataError: If every token stays.
    """
    used = sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-counts[i], i))
    kept = {*protected, *(pieces.ids[piece] for piece in pieces.needed)}
    num_needed = len(kept)
    if num_tokens is None:
        for token in used:
            kept |= _needs(pieces, tokens, token)
    elif num_tokens < num_needed:
        raise ConfigError(
            f"{section}num_tokens is {num_tokens:,}, but {num_needed:,} tokens must stay: special "
            "and added ones, bytes and characters; set a higher number"
        )
    wanted = -(-(num_tokens or len(kept)) // multiple_of) * multiple_of
    unused = [token for token in sorted(tokens) if not counts[token]]
    num_before = len(kept)
    _fill(kept, (_needs(pieces, tokens, token) for token in (*used, *unused)), wanted)
    num_used = sum(1 for token in kept if counts[token])
    if len(kept) >= len(counts):
        raise DataError(
            f"{section}corpora: all {len(counts):,} tokens would stay, so there is nothing to "
            "remove; name less text, or set num_tokens"
        )
    if kept >= tokens.keys() and len(kept) % multiple_of:
        raise ConfigError(
            f"{section}multiple_of is {multiple_of:,}, but all {len(kept):,} tokens would stay, "
            "which is no multiple of it; set a lower one, name less text, or set num_tokens"
        )
    keeps_all_used = num_used == len(used)
    return Choice(
        rows=tuple(sorted(kept, key=lambda token: (token not in tokens, token))),
        num_used=num_used,
        num_fillers=len(kept) - num_before if keeps_all_used and num_tokens is None else 0,
        keeps_all_used=keeps_all_used,
    )


def _fill(kept: set[int], groups: Iterable[set[int]], size: int) -> None:
    """Add groups of tokens as wholes, in their order, as far as there is room."""
    for group in groups:
        if len(kept) == size:
            return
        new = group - kept
        if len(kept) + len(new) <= size:
            kept |= new


def _needs(pieces: Pieces, tokens: Mapping[int, str], token: int) -> set[int]:
    """Return a token with the tokens that it is merged from."""
    text = tokens[token]
    if text not in pieces.ids:  # added to the pieces
        return {token}
    found: Iterable[str] = pieces.parts(text)
    return {token, *(pieces.ids[piece] for piece in found if piece in pieces.ids)}
