"""Pages of documentation: their links, headings, code blocks, and the commands of shell blocks."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
_MARKDOWN = MarkdownIt().enable("table")
_HTML_LINK = re.compile(r"""\b(?:href|src)=["']([^"']+)""")
_HTML_ANCHOR = re.compile(r"""\b(?:id|name)=["']([^"']+)""")
# Bash expands variables, loops and quotes. Programs are not found, and the handler writes
# the line, the number of words, and the words to file descriptor 3.
_RECORDER = """\
set -euo pipefail
PATH=/nonexistent
_record() { local line=$1; shift; printf '%s\\0' "$line" "$#" "$@" >&3; }
command_not_found_handle() { _record "${BASH_LINENO[0]}" "$@"; }
cd() { _record "${BASH_LINENO[0]}" cd "$@"; }
source() { _record "${BASH_LINENO[0]}" source "$@"; }
"""


class Fence(NamedTuple):
    """A block of code; ``line`` is the line before its text."""

    language: str
    line: int
    text: str


class Call(NamedTuple):
    """A command as the shell would run it."""

    line: int
    words: list[str]


class Page:
    """A Markdown file of the repository."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self._tokens = _MARKDOWN.parse(path.read_text(encoding="utf-8"))

    def fences(self) -> list[Fence]:
        """Return the code blocks."""
        return [
            Fence(token.info, token.map[0] + 1, token.content)
            for token in self._tokens
            if token.type == "fence" and token.map
        ]

    def links(self) -> Iterator[tuple[int, str]]:
        """Yield the line and the target of every link and image."""
        for line, token in self._with_children():
            if "html" in token.type:
                yield from ((line, link) for link in _HTML_LINK.findall(token.content))
            target = token.attrGet("href") or token.attrGet("src")
            if target:
                yield line, str(target)

    def anchors(self) -> set[str]:
        """Return the names of headings, as GitHub and mkdocs spell them, and of HTML anchors."""
        found: Counter[str] = Counter()
        anchors = set()
        for position, token in enumerate(self._tokens):
            if token.type == "heading_open":
                children = self._tokens[position + 1].children or []
                text = "".join(child.content for child in children).lower()
                slug = re.sub(r"[^\w\s-]", "", text).strip().replace(" ", "-")
                anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
                found[slug] += 1
        for _, token in self._with_children():
            if "html" in token.type:
                anchors.update(_HTML_ANCHOR.findall(token.content))
        return anchors

    def code_spans(self) -> Iterator[tuple[int, str]]:
        """Yield the line and the text of code inside paragraphs and tables."""
        for line, token in self._with_children():
            if token.type == "code_inline":
                yield line, token.content

    def calls(self, folder: Path, **variables: str) -> list[Call]:
        """Return the commands of all shell blocks, which share their variables.

        Args:
            folder: Working directory.
            **variables: Environment of the shell.

        Returns:
            Every command, with its line in the page.
        """
        # All other lines are left empty, so that bash counts the lines of the page.
        script = [""] * len(self.path.read_text(encoding="utf-8").splitlines())
        for fence in self.fences():
            if fence.language == "sh":
                lines = fence.text.splitlines()
                script[fence.line : fence.line + len(lines)] = lines
        recorder = _RECORDER + "".join(
            f'{name}() {{ _record "${{BASH_LINENO[0]}}" {name} "$@"; }}\n'
            for name in sorted(set(re.findall(r"\.venv/bin/[\w-]+", "\n".join(script))))
        )
        (folder / "recorder.sh").write_text(recorder, encoding="utf-8")
        (folder / "page.sh").write_text("\n".join(script) + "\n", encoding="utf-8")
        done = subprocess.run(
            ["bash", "-c", "builtin source ./recorder.sh; builtin source ./page.sh 3>calls"],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{self.name}: {done.stderr}"
        return list(_read_calls((folder / "calls").read_text(encoding="utf-8")))

    def _with_children(self) -> Iterator[tuple[int, Token]]:
        line = 0
        for token in self._tokens:
            line = token.map[0] + 1 if token.map else line
            yield line, token
            for child in token.children or []:
                yield line, child
                line += child.type in {"softbreak", "hardbreak"}


def _read_calls(record: str) -> Iterator[Call]:
    fields = iter(record.split("\0")[:-1])
    for line in fields:
        yield Call(int(line), [next(fields) for _ in range(int(next(fields)))])


def pages() -> list[Page]:
    """Return every page that a reader of the repository is sent to."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
    return [Page(path) for path in [*(ROOT / name for name in names), *ROOT.glob("docs/**/*.md")]]
