"""Documents read from a local .txt, .jsonl or .parquet file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from grasp_lightning.data.records import check_data_file, read_columns, read_records, text_of
from grasp_lightning.errors import DataError
from grasp_lightning.reading.text import read_text

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_EXPECTED = f"a file: {', '.join(_SUFFIXES)}"


def read_file(path: Path, field: str) -> tuple[str, ...]:
    """Return the documents of a file, in order; at least one of them has text.

    A .txt file is one document: its lines, joined with two line feeds, the convention behind
    published WikiText perplexities. A .jsonl file has one document per line, a .parquet file one
    per row. An unreadable file is a ``DataError``.

    Args:
        field: Key (.jsonl) or column (.parquet) of the text; .txt has none.

    Raises:
        DataError: If no document has text.
    """
    check_data_file(path, _SUFFIXES, _EXPECTED)
    documents = tuple(_documents(path, field))
    if not any(text.strip() for text in documents):
        raise DataError(f"{path} is empty; expected a file with text")
    return documents


def join_rows(rows: Sequence[str]) -> str:
    """Return rows, which keep their own line feeds, as one document with two more between them."""
    return "\n\n".join(rows)


def _documents(path: Path, field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        # utf-8-sig: the byte-order mark that some editors write is not part of the text.
        yield join_rows(read_text(path, encoding="utf-8-sig").splitlines(keepends=True))
    elif suffix == ".jsonl":
        for place, record in read_records(path, [field]):
            yield text_of(record, field, place, f"the field {field!r}")
    else:
        yield from read_columns(path, [field], are_texts=True)[field]
