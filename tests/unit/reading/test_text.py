"""Paths, text, YAML and JSON: every error is one line."""

import os
import socket
from pathlib import Path

import pytest

from grasp_lightning.errors import ConfigError, PlanError
from grasp_lightning.reading.text import (
    check_file,
    parse_json,
    read_json,
    read_text,
    user_path,
)
from grasp_lightning.reading.yaml_text import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~nouser/x", "key: ~nouser/x: ~nouser has no home folder"),
        ("a\0b", "key: 'a\\x00b' is not a path: embedded null byte"),
        ("a" * 300, "File name too long"),
        ("a/" * 5000, "File name too long"),
        ("\ud800", "key: '\\ud800' is not a path"),
    ],
)
def test_a_path_that_no_file_can_have_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        user_path(text, "key", ConfigError)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_path_of_nothing_is_a_path() -> None:
    assert user_path("~/x/y", "key") == Path.home() / "x" / "y"


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    expected = {
        "fifo": "is a FIFO; expected a file; name another",
        "dangling": "cannot be read: a link to gone, which does not exist",
        "loop": "cannot be read: Too many levels of symbolic links",
        "folder": "is a folder; expected a file",
        "socket": "is a socket; expected a file",
        "absent": "cannot be read: No such file or directory",
        "/dev/zero": "is a device; expected a file",
    }
    for name, text in expected.items():
        with pytest.raises(PlanError) as raised:
            check_file(tmp_path / name, PlanError, f"key: {name}", "name another")
        assert f"key: {name} {text}" in str(raised.value)


def bomb() -> str:
    """Some lines whose aliases of aliases expand to a million values."""
    lists = [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10)}]" for i in range(1, 7)]
    return "\n".join(["k0: &k0 0", *lists])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 50_000, "nested more than 100 levels deep"),
        ("a: " + "1" * 5000, "Exceeds the limit (4300 digits)"),
        ("b: 1\na: 0x" + "f" * 5000, "a number of 20000 bits in line 2"),
        ("a: 2020-13-45", "month must be in 1..12"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3", "line 5: the key c is given twice"),
        ("a: 1\n1: 2", "line 2: the key 1 is not text; quote it"),
        ("on: 1", "line 1: the key on is not text; quote it"),
        ("[a]: 1", "line 1: the key a list or section is not text; quote it"),
        ("a: &x [*x]", "counting every use of an alias"),
        (bomb(), "more than 100000 values"),
        ("a: !!int x", "invalid literal"),
        ("a: !!int ''", "not valid YAML: "),
        ("a: !!bool x", "not valid YAML: "),
        ("a: !!timestamp x", "not valid YAML: "),
        ("a: !!float x", "not valid YAML: "),
        ("a: " + "1:" * 300 + "1.5", "not valid YAML: "),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: \x01", "not valid YAML: "),
        ("a: [", "run.yaml: not valid YAML: "),
        ("a: 1\n---\nb: 1", "not valid YAML: "),
    ],
)
def test_yaml_that_is_none_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text, "run.yaml", ConfigError)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_aliases_and_merges_are_read() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a"
    assert parse_yaml(text, "run.yaml") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 2},
    }


def test_cards_of_others_may_have_keys_that_ours_may_not() -> None:
    assert parse_yaml("no: 1\n2: 3\na: 1\na: 2", "card", is_strict=False) == {
        False: 1,
        2: 3,
        "a": 2,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "plan.json is not JSON (maximum recursion depth exceeded"),
        ("1" * 5000, "Exceeds the limit (4300 digits)"),
        ("[NaN]", "plan.json is not JSON (NaN is not a number); write it again"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("{", "plan.json is not JSON (Expecting property name"),
        ('{\n"a": }', "in line 2)"),
    ],
)
def test_json_that_is_none_is_one_line(text: str, expected: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse_json(text, "plan.json", PlanError, "write it again")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_are_read_and_undecodable_bytes_are_named(tmp_path: Path) -> None:
    good, bad, huge = tmp_path / "good", tmp_path / "bad", tmp_path / "huge"
    good.write_text('{"a": 1}', encoding="utf-8")
    bad.write_bytes(b"\xff")
    with huge.open("wb") as stream:
        stream.truncate(2**40)
    assert read_json(good) == read_yaml(good) == {"a": 1}
    for read in (read_text, read_json, read_yaml):
        with pytest.raises(
            ConfigError, match=r"bad is not UTF-8 text \(invalid start byte\); conv"
        ):
            read(bad, ConfigError)
    for read in (read_json, read_yaml):
        with pytest.raises(ConfigError, match="role has more than 256 MB"):
            read(huge, ConfigError, "role")
