"""Check that texts are easy to read: short sentences in Markdown, no archaic turns anywhere.

Usage: ``python -m scripts.prose FILE...``. Each finding is one line, ``file:line: what to write``;
the exit code is 1 if there are any. ``scripts/archaic.txt`` lists the turns.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

MAX_WORDS: Final = 35
TURNS: Final = Path(__file__).with_name("archaic.txt")
_ARROW = " -> "
_MARKDOWN = MarkdownIt().enable("table")
_URL = re.compile(r"(?<=\]\()[^)]*|<?https?://[^\s)>]*>?")
_SENTENCE_END = re.compile(r"[.!?][)\]\"'*_]*\s+")
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|et al|etc|vs|cf|Eq|Fig|Sec|No|approx)|\b[A-Z])$")
_TEXT_TOKENS = {tokenize.COMMENT, tokenize.STRING} | {
    # Python 3.12 and newer split f-strings into several tokens.
    getattr(tokenize, name)
    for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if hasattr(tokenize, name)
}
_MARKS = re.compile(r"^\s*#+:?|^[A-Za-z]{0,2}(\"\"\"|'''|\"|')|(\"\"\"|'''|\"|')$")
_NOT_TEXT = "\0"  # matches no turn


class Turn(NamedTuple):
    """A turn to avoid, and what to write."""

    pattern: re.Pattern[str]
    suggestion: str


class Finding(NamedTuple):
    """A place to rewrite; lines count from 1."""

    line: int
    advice: str


def read_turns(text: str) -> list[Turn]:
    """Read a list of turns: each line holds a regular expression, `` -> `` and a suggestion.

    An expression matches whole words and ignores case; a space in it also matches a line break.
    Empty lines, and lines that begin with ``#``, are skipped.

    Raises:
        ValueError: If a line is anything else.
    """
    turns = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words, arrow, suggestion = (part.strip() for part in line.partition(_ARROW))
        if not (words and arrow and suggestion):
            raise ValueError(f"line {number}: expected 'turn -> suggestion', got {line!r}")
        spaced = words.replace(" ", r"\s+")
        try:
            pattern = re.compile(rf"(?<!\w)(?:{spaced})(?!\w)", re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"line {number}: {words!r} is not a pattern: {error}") from error
        turns.append(Turn(pattern, suggestion))
    return turns


def archaic_turns(text: str, turns: Sequence[Turn]) -> Iterator[Finding]:
    """Find the turns in a text from ``prose_of``."""
    for pattern, suggestion in turns:
        for match in pattern.finditer(text):
            found = " ".join(match[0].split())
            line = text.count("\n", 0, match.start()) + 1
            yield Finding(line, f"'{found}': {suggestion}")


def prose_of(name: str, source: str) -> str:
    """Blank out everything except prose, and keep the position of every character.

    Prose is comments and strings in Python files, and everything but URLs in Markdown files.
    """
    if name.endswith(".py"):
        return _python_prose(source)
    if name.endswith(".md"):
        return _URL.sub(lambda match: _NOT_TEXT * len(match[0]), source)
    return re.sub(r"^(\s*)#", r"\1 ", source, flags=re.MULTILINE)


def _python_prose(source: str) -> str:
    lines = io.StringIO(source).readlines()
    # White space between tokens stays, to find turns that are split over comments and strings.
    prose = [re.sub(r"\S", _NOT_TEXT, line) for line in lines]
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type not in _TEXT_TOKENS:
            continue
        (first, begin), (last, end) = token.start, token.end
        for row in range(first - 1, last):
            left = begin if row == first - 1 else 0
            right = end if row == last - 1 else len(lines[row])
            text = _MARKS.sub(lambda match: " " * len(match[0]), lines[row][left:right])
            prose[row] = prose[row][:left] + text + prose[row][right:]
    return "".join(prose)


def long_sentences(markdown: str, max_words: int = MAX_WORDS) -> Iterator[Finding]:
    """Find sentences with too many words, outside tables and code blocks.

    Headings, paragraphs and list items end a sentence. A code span counts as one word.
    """
    in_table = False
    for token in _MARKDOWN.parse(markdown):
        if token.type in {"table_open", "table_close"}:
            in_table = token.type == "table_open"
        if token.type != "inline" or in_table or token.map is None:
            continue
        text = "".join(map(_plain, token.children or []))
        for start, sentence in _sentences(text):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > max_words:
                line = token.map[0] + 1 + text.count("\n", 0, start)
                begin = " ".join(words[:6])
                yield Finding(
                    line, f"'{begin} ...': {len(words)} words, split it (at most {max_words})"
                )


def _plain(child: Token) -> str:
    """Return the text of a part of a paragraph, without marks and addresses."""
    if child.type == "code_inline":
        return "`" + re.sub(r"\s+", "_", child.content) + "`"
    if child.type in {"softbreak", "hardbreak"}:
        return "\n"
    return child.content if child.type == "text" else ""


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence of a paragraph with its position."""
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[start : match.start()]):
            yield start, text[start : match.end()]
            start = match.end()
    if text[start:].strip():
        yield start, text[start:]


def findings(name: str, source: str, turns: Sequence[Turn]) -> list[Finding]:
    """Return all findings of a file, in the order of its lines."""
    found = list(archaic_turns(prose_of(name, source), turns))
    if name.endswith(".md"):
        found += long_sentences(source)
    return sorted(found)


def main(files: Sequence[str]) -> int:
    """Print the findings of the files and return the exit code."""
    turns = read_turns(TURNS.read_text(encoding="utf-8"))
    count = 0
    for file in files:
        for line, advice in findings(file, Path(file).read_text(encoding="utf-8"), turns):
            print(f"{file}:{line}: {advice}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
