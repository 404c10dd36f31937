"""Records of a local .jsonl, .json or .parquet file; errors name file, line and key."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp_lightning.errors import DataError
from grasp_lightning.reading.text import (
    check_file,
    one_line,
    parse_json,
    read_json_lines,
    read_text,
)


def check_data_file(path: Path, suffixes: Sequence[str], expected: str) -> None:
    """Refuse a path that is not a file with one of the suffixes, which ``expected`` describes."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected {expected}")
    if path.suffix.lower() not in suffixes:
        expected = expected.replace("a file: ", "one of ")
        raise DataError(f"{path} has the suffix {path.suffix!r}; expected {expected}")
    if not (path.exists() or path.is_symlink()):
        raise DataError(f"{path} does not exist; expected {expected}")


def read_records(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, object]]:
    """Yield each record of a file with its place, for messages.

    A .jsonl file has one record per line, a .json file is a list of records, a .parquet file has
    one per row. An unreadable file is a ``DataError``; the records are not checked.

    Args:
        required: Columns that a .parquet file must have.
        optional: Columns that are read if present.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, record in read_json_lines(path):
            yield f"{path}, line {number}", record
    elif suffix == ".json":
        for number, record in enumerate(_json_list(path), start=1):
            yield f"{path}, item {number}", record
    else:
        columns = read_columns(path, required, optional)
        for number, values in enumerate(zip(*columns.values(), strict=True)):
            yield f"{path}, row {number}", dict(zip(columns, values, strict=True))


def text_of(record: object, field: str, place: str, expected: str) -> str:
    """Return the text of a field; ``place`` and ``expected`` describe the record in messages."""
    if not isinstance(record, Mapping):
        raise DataError(f"{place} is not a JSON object; expected one with {expected}")
    if field not in record:
        raise DataError(f"{place} has no field {field!r}; it has: {_names(record)}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} is {type(text).__name__}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} contains half of a surrogate pair, which is not text"
        ) from error
    return text


def read_columns(
    path: Path, required: Sequence[str], optional: Sequence[str] = (), *, are_texts: bool = False
) -> dict[str, list[Any]]:  # Any: a column of any type
    """Return the values of columns of a .parquet file, by name.

    Args:
        optional: Columns that are read if present.
        are_texts: Refuse columns of other types, and rows without text.

    Raises:
        DataError: If the file is damaged, lacks a column, or has one twice.
    """
    # Heavy, so loaded on use.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    check_file(path)
    try:
        names: list[str] = pq.read_schema(path).names
        wanted = _wanted(path, names, required, optional)
        table = pq.read_table(path, columns=wanted)
        columns = {name: table[name] for name in wanted}
        for name, column in columns.items() if are_texts else ():
            _check_texts(path, name, column)
        return {name: column.to_pylist() for name, column in columns.items()}
    # pyarrow also raises OSError and ValueError, for example where text is not UTF-8.
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path} is not a readable parquet file: {one_line(error)}") from error


def _wanted(
    path: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> list[str]:
    wanted = [*required, *(name for name in optional if name in names)]
    for name in wanted:
        if name not in names:
            raise DataError(f"{path} has no column {name!r}; it has: {_names(names)}")
        if names.count(name) > 1:
            raise DataError(f"{path} has {names.count(name)} columns {name!r}; expected one")
    return wanted


def _check_texts(path: Path, name: str, column: Any) -> None:  # noqa: ANN401  pyarrow is untyped
    import pyarrow as pa  # noqa: PLC0415

    kind = column.type
    if pa.types.is_dictionary(kind):  # repeated strings, each stored once
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise DataError(f"{path}: column {name!r} is {column.type}; expected strings")
    texts = column.to_pylist()
    if None in texts:
        row = texts.index(None)
        raise DataError(f"{path}: column {name!r} has no text in row {row}; expected strings")


def _json_list(path: Path) -> list[object]:
    text = read_text(path, encoding="utf-8-sig")
    if not text.strip():
        return []
    expected = "expected a list of objects; one object per line belongs in a .jsonl file"
    records = parse_json(text, str(path), DataError, expected, is_strict=False)
    if not isinstance(records, list):
        raise DataError(f"{path} is not a JSON list; {expected}")
    return records


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
