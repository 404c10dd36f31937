"""Documents read from a local .txt, .jsonl or .parquet file."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grasp_lightning.errors import DataError


def read_file(path: Path, field: str) -> tuple[str, ...]:
    """Return the documents of a file, in its order.

    A .txt file is one document: its rows, joined with two line feeds, which is how the rows of
    WikiText are joined wherever its perplexity is reported. A .jsonl file has one document per
    line, a .parquet file one per row.

    Args:
        path: The file; its suffix tells the format.
        field: Key (.jsonl) or column (.parquet) that holds the text; .txt has none.

    Returns:
        The documents; at least one of them has text.

    Raises:
        DataError: If the file cannot be read, is of another format, or has no text.
    """
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file: {_SUFFIXES}")
    if reader is None:
        raise DataError(f"{path} has the suffix {path.suffix!r}; expected one of {_SUFFIXES}")
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a text file: {_SUFFIXES}")
    try:
        documents = reader(path, field)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not any(text.strip() for text in documents):
        raise DataError(f"{path} is empty; expected a file with text")
    return documents


def join_rows(rows: Sequence[str]) -> str:
    """Return the rows of one corpus as one document, two line feeds between them.

    Args:
        rows: The rows, each with the line feed that it may end in.

    Returns:
        The document.
    """
    return "\n\n".join(rows)


def _read_txt(path: Path, _field: str) -> tuple[str, ...]:
    # utf-8-sig: the byte-order mark that some editors write is no part of the text.
    return (join_rows(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)),)


def _read_jsonl(path: Path, field: str) -> tuple[str, ...]:
    return tuple(_jsonl_texts(path, field))


def _jsonl_texts(path: Path, field: str) -> Iterator[str]:
    # The file is split at line feeds only: JSON strings may hold other separators unescaped.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _jsonl_text(line, field, f"{path}, line {number}")


def _jsonl_text(line: str, field: str, place: str) -> str:
    try:
        record: Any = json.loads(line)  # Any: parsed JSON
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        reason = getattr(error, "msg", error)
        raise DataError(f"{place} is not JSON ({reason}); expected one object per line") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is no JSON object; expected one with the field {field!r}")
    if field not in record:
        raise DataError(f"{place} has no field {field!r}; it has: {_names(record)}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} is {type(text).__name__}; expected a string")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"{place}: field {field!r} holds half of a surrogate pair, which is no text"
        )
    return text


def _read_parquet(path: Path, field: str) -> tuple[str, ...]:
    # Heavy, so loaded on use.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        schema = pq.read_schema(path)
        if field not in schema.names:
            raise DataError(f"{path} has no column {field!r}; it has: {_names(schema.names)}")
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {field!r} is {kind}; expected strings")
        texts: list[str | None] = pq.read_table(path, columns=[field])[field].to_pylist()
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file: {reason}") from error
    if None in texts:
        row = texts.index(None)
        raise DataError(f"{path}: column {field!r} has no text in row {row}; expected strings")
    return tuple(text for text in texts if text is not None)


def _names(names: Iterator[str] | Sequence[str] | dict[str, object]) -> str:
    return ", ".join(names) or "nothing"


_READERS: dict[str, Callable[[Path, str], tuple[str, ...]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_SUFFIXES = ", ".join(_READERS)
