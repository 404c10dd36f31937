"""The check of prose: which sentences and turns it reports, and where."""

from pathlib import Path

import pytest

from scripts.prose import (
    MAX_WORDS,
    TURNS,
    findings,
    long_sentences,
    main,
    prose_of,
    read_turns,
)

# No turn of the real list, or this file would not pass the check itself.
LIST = """
# A comment.
purple (cow|cows) -> a brown one
(?<!not\\s)green ideas -> good ideas
"""
TURN = "'purple cow': a brown one"
LONG = " ".join(["word"] * (MAX_WORDS + 1))
SHORT = " ".join(["word"] * MAX_WORDS)


def found(name: str, text: str) -> list[tuple[int, str]]:
    return [(line, advice) for line, advice in findings(name, text, read_turns(LIST))]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A purple cow.", 1),
        ("One.\n\nA Purple\ncow.", 3),
        ("- item\n- a purple cow\n", 2),
        ("| a | b |\n|---|---|\n| x | purple cow |\n", 3),
        ("```sh\nrun  # a purple cow\n```\n", 2),
    ],
)
def test_a_turn_is_found_in_markdown(text: str, line: int) -> None:
    assert [(at, advice.lower()) for at, advice in found("a.md", text)] == [(line, TURN)]


@pytest.mark.parametrize(
    "text",
    [
        "A purple cowboy, and not green ideas.",
        "[a link](https://example.org/purple cow)",
        "See https://example.org/?q=green+ideas.",
    ],
)
def test_parts_of_words_and_addresses_are_no_turns(text: str) -> None:
    assert not found("a.md", text)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""A docstring.\n\nWith a purple cow.\n"""\n', 3),
        ("x = 1  # a purple cow\n", 1),
        ("# a comment with a purple\n# cow in it\n", 1),
        ('x = (\n    "a string with a purple "\n    f"cow and {x}"\n)\n', 2),
        ("def f():\n    return f'{x}: purple cow'\n", 2),
    ],
)
def test_a_turn_is_found_in_comments_and_strings(source: str, line: int) -> None:
    assert found("a.py", source) == [(line, TURN)]


@pytest.mark.parametrize(
    "source", ["purple = cow\n", "f('purple', 'cow')\n", "x = purple  # cow\n"]
)
def test_code_is_no_prose(source: str) -> None:
    assert not found("a.py", source)


def test_a_turn_is_found_in_other_files() -> None:
    assert found("a.yaml", "key: 1\n# a purple\n# cow\n") == [(2, TURN)]


def test_prose_keeps_its_place() -> None:
    source = "x = f(1)  # why\ny = 'what'\n"
    assert prose_of("a.py", source) == "\0 \0 \0\0\0\0    why\n\0 \0  what \n"


@pytest.mark.parametrize(
    "text",
    [
        f"{SHORT}. {SHORT}! {SHORT}? ({SHORT}.) {SHORT}.",
        f"{SHORT}.\n{SHORT}.\n",
        f"# {SHORT}\n\n{SHORT}:\n\n- {SHORT}\n- {SHORT}\n",
        f"{SHORT} - + ... -\n",
        f"```text\n{LONG}\n```\n",
        f"| a |\n|---|\n| {LONG} |\n",
        f"{SHORT[:-5]} `{LONG}. {LONG}.`",
        f"{SHORT[:-5]} [word](https://example.org/{LONG.replace(' ', '-')})",
    ],
)
def test_short_sentences_pass(text: str) -> None:
    assert not list(long_sentences(text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{LONG}.", 1),
        (f"Short.\n\nShort.\n{LONG}.", 4),
        (f"- {SHORT}\n- {LONG}\n", 2),
        (f"# {LONG}\n", 1),
        (f"{SHORT} e.g. word.", 1),
        (f"{SHORT} **bold** `code`.", 1),
        (f"{SHORT[:-5]} [a link](there.md).", 1),
        (f"{SHORT} version 1.5.", 1),
    ],
)
def test_a_long_sentence_is_found(text: str, line: int) -> None:
    assert [finding.line for finding in long_sentences(text)] == [line]


def test_the_advice_shows_the_sentence_and_its_length() -> None:
    [finding] = long_sentences(f"First. One two three four five six seven {LONG}.")
    assert finding.advice == (
        f"'One two three four five six ...': {MAX_WORDS + 8} words, split it (at most {MAX_WORDS})"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\n", "line 1: expected 'turn -> suggestion', got 'a b'"),
        ("# x\na -> \n", "line 2: expected 'turn -> suggestion', got 'a -> '"),
        ("a( -> b\n", r"line 1: 'a\(' is not a pattern: missing \)"),
    ],
)
def test_a_bad_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        read_turns(text)


def test_no_suggestion_is_itself_a_turn() -> None:
    turns = read_turns(TURNS.read_text(encoding="utf-8"))
    assert turns
    for turn in turns:
        for other in turns:
            assert not other.pattern.search(turn.suggestion), turn.suggestion


def test_the_program_prints_findings_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = tmp_path / "bad.md", tmp_path / "good.md"
    bad.write_text(f"Fine.\n\n{LONG}.\n", encoding="utf-8")
    good.write_text("Fine.\n", encoding="utf-8")
    assert main([str(good)]) == 0
    assert main([str(good), str(bad)]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{bad}:3: 'word word")
