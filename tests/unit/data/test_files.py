import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grasp_lightning.data.files import read_file
from grasp_lightning.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_text_file_is_one_document_of_rows_joined_by_two_line_feeds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " = Title = \n\nFirst.\nLast")
    assert read_file(path, "text") == (" = Title = \n\n\n\n\n\nFirst.\n\n\nLast",)


def test_byte_order_mark_and_carriage_returns_are_not_part_of_the_text(tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "a.TXT", b"\xef\xbb\xbfa\r\nb"), "text") == ("a\n\n\nb",)


def test_json_lines_are_documents_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028still one", "url": "x"}, {"text": "two"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = write(tmp_path / "a.jsonl", "\n" + "\n  \n".join(lines) + "\n")
    assert read_file(path, "text") == ("one\u2028still one", "two")


def test_the_field_of_json_lines_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "content": "b"}')
    assert read_file(path, "content") == ("b",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3 is not JSON"),
        ('["text"]', "line 3 is not a JSON object; expected one with the field 'text'"),
        ('{"url": 1, "body": 2}', "line 3 has no field 'text'; it has: url, body"),
        ("{}", "line 3 has no field 'text'; it has: nothing"),
        ('{"text": null}', "line 3: field 'text' is NoneType; expected a string"),
        ('{"text": ["a"]}', "line 3: field 'text' is list; expected a string"),
    ],
)
def test_a_wrong_json_line_is_named_by_file_and_number(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_file(path, "text")
    assert str(caught.value).startswith(f"{path}, {message}")
    assert "\n" not in str(caught.value)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", "two"], number=[1, 2])
    assert read_file(path, "text") == ("one", "two")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_strings_of_every_kind_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", "two", "one"]
    table = pa.table({"text": pa.array(texts, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", "text") == tuple(texts)
    encoded = pa.array(texts).dictionary_encode()
    pq.write_table(pa.table({"text": encoded}), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", "text") == tuple(texts)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns 'text'; expected one"):
        read_file(tmp_path / "a.parquet", "text")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_nobody_waits_for_a_fifo(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match="is a FIFO; expected a file"):
        read_file(tmp_path / f"a{suffix}", "text")


def test_other_fields_of_a_record_may_be_no_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "score": NaN}')
    assert read_file(path, "text") == ("a",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "url": ["b"]}, "has no column 'text'; it has: body, url"),
        ({"text": [1, 2]}, "column 'text' is int64; expected strings"),
        ({"text": ["a", None]}, "column 'text' has no text in row 1; expected strings"),
    ],
)
def test_a_wrong_parquet_column_is_named(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=r"a\.parquet") as caught:
        read_file(path, "text")
    assert message in str(caught.value)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file: ") as caught:
        read_file(path, "text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", "caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_file(path, "text")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; expected a file: \.txt, \.jsonl, \.parquet"):
        read_file(tmp_path, "text")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        read_file(tmp_path / "gone.txt", "text")


def test_an_unknown_suffix_names_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.csv'; expected one of \.txt, \.jsonl, \.parquet"):
        read_file(write(tmp_path / "a.csv", "a"), "text")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", "\n"), ("a.jsonl", '{"text": " "}')],
)
def test_a_file_without_text_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="is empty; expected a file with text"):
        read_file(write(tmp_path / name, content), "text")


def test_wikitext_rows_are_joined_as_the_field_does(grasp_data: Path) -> None:
    path = grasp_data / "wikitext2_raw" / "test.txt"
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(rows) == 4358
    assert read_file(path, "text") == ("\n\n".join(rows),)


def test_every_line_of_the_c4_sample_is_a_document(grasp_data: Path) -> None:
    path = grasp_data / "c4" / "realnewslike_validation_sample.jsonl"
    assert len(read_file(path, "text")) == 520
