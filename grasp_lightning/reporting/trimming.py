"""The result of ``trim``: what was removed, and how long texts are, as JSON and as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.table import Table

from grasp_lightning.reporting.metrics import Change, TextLength, VocabularyChange
from grasp_lightning.reporting.tables import (
    Row,
    factor_text,
    megabytes_text,
    narrow_table,
    percent_text,
)

_MAX_SHOWN = 8  # special tokens


@dataclass(frozen=True, kw_only=True)
class TrimFacts:
    """What was removed: the content of trim.json.

    Attributes:
        model: Name of the original model.
        dtype: Type of its weights.
        tokens: Rows of the embedding.
        parameters: Parameters of the model, tied ones counted once.
        bytes: Bytes of all parameters.
        used_tokens: How many of the tokens that stay the corpora use.
        filling_tokens: How many they do not use, and only fill up the number to ``multiple_of``.
        same_pieces: Whether the corpora are split as before, which was checked.
        logit_difference: Largest absolute difference of logits over the tokens that stay.
        largest_logit: Largest absolute value of these logits.
        special_tokens: New ids of special and added tokens, all of which stay.
        texts: Lengths of the corpora, and of another text.
    """

    model: str
    dtype: str
    tokens: Change[int]
    parameters: Change[int]
    bytes: Change[int]
    used_tokens: int
    filling_tokens: int
    same_pieces: bool
    logit_difference: float
    largest_logit: float
    special_tokens: Mapping[str, int]
    texts: tuple[TextLength, ...]

    @property
    def change(self) -> VocabularyChange:
        """What a run's metrics say of it."""
        return VocabularyChange(
            tokens=self.tokens,
            parameters=self.parameters,
            same_pieces=self.same_pieces,
            texts=self.texts,
        )


def trim_table(facts: TrimFacts) -> Table:
    """Return sizes and lengths before and after, for the terminal."""
    table = narrow_table(trim_notes(facts), "Trimmed vocabulary")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in trim_rows_of(facts):
        table.add_row(*row)
    return table


def trim_rows_of(facts: TrimFacts) -> Iterator[Row]:
    """Yield the lines of the table."""
    for name, change, text in (
        ("tokens", facts.tokens, "{:,}".format),
        ("parameters", facts.parameters, "{:,}".format),
        (f"MB at {facts.dtype}", facts.bytes, megabytes_text),
    ):
        before, after = change.values
        yield Row(name, text(before), text(after), percent_text(before, after))
    for length in facts.texts:
        shorter, longer = length.tokens_per_byte.values
        name = f"tokens per byte, {length.name}{'' if length.is_named else ' *'}"
        yield Row(name, f"{shorter:.4f}", f"{longer:.4f}", factor_text(shorter, longer))


def trim_content(facts: TrimFacts) -> dict[str, object]:
    """Return the values that the card of the trimmed model needs."""
    return {
        "rows": list(trim_rows_of(facts)),
        "texts": [text.name for text in facts.texts if text.is_named],
        "unnamed": next(text.name for text in facts.texts if not text.is_named),
        "same_pieces": facts.same_pieces,
    }


def trim_notes(facts: TrimFacts) -> tuple[str, ...]:
    """Return sentences on what stays, and on what is the same as before."""
    pieces = (
        "The corpora are split into the same pieces as before."
        if facts.same_pieces
        else "The corpora are split into other pieces than before, because of num_tokens."
    )
    notes = [f"{facts.model}: {facts.used_tokens:,} of the tokens that stay are in the corpora."]
    if facts.filling_tokens:
        notes.append(f"{facts.filling_tokens:,} unused tokens stay to fill up multiple_of.")
    names = sorted(facts.special_tokens, key=facts.special_tokens.__getitem__)
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    special = f"Special and added tokens that stay: {' '.join(names[:_MAX_SHOWN])}{more}."
    logits = (
        f"Logits over the tokens that stay differ by at most {facts.logit_difference:.1e}; the "
        f"largest is {facts.largest_logit:.1f}."
    )
    star = "*: a text whose tokens were not counted."
    return (*notes, pieces, logits, special, star)
