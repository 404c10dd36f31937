"""Paths, text, YAML and JSON that a user gave; whatever is wrong with them is one line.

Every function takes ``raises``, the class of ``errors`` to raise; ``what``, which messages call the
thing that is read (its path, if None); and ``advice``, what to do, for the end of the message. No
torch here.
"""

import errno
import json
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from grasp_lightning.errors import DataError, GraspError

_MAX_BYTES = 2**28  # of a YAML or JSON file; the largest plans have some megabytes
_MAX_DEPTH = 100  # levels of a YAML file
_MAX_NODES = 100_000  # of a YAML file, each alias counted as often as it is used
_MAX_QUOTED = 200  # characters of a library's message
_TEXT_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

# What PyYAML raises beside its own errors: impossible dates, integers of thousands of digits, tags
# that do not fit their text, nesting.
_YAML_ERRORS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    RecursionError,
)


def one_line(error: BaseException | str) -> str:
    """Return the text of an error on one line, cut to a readable length; else its class."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]} ..."


def told(what: object, reason: str, advice: str = "") -> str:
    """Return the line that says what is wrong with something, and what to do."""
    return f"{what} {reason}{f'; {advice}' if advice else ''}"


def user_path(text: str, key: str, raises: type[GraspError] = DataError) -> Path:
    """Return the path that a key names, ``~`` expanded; refuse what can be no file's name."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise raises(f"{key}: {one_line(text)}: there is no home folder of {user}") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise raises(f"{key}: {text!r:.{_MAX_QUOTED}} is no path: {one_line(error)}") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise raises(f"{key}: {one_line(text)}: {_reason(error)}") from error
    return path


def check_file(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> None:
    """Refuse what is no regular file: nobody waits for a FIFO, or reads a device without end."""
    what = what or str(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            reason = f"a link to {path.readlink()}, which does not exist"
        raise raises(told(what, f"cannot be read: {reason}", advice)) from error
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no file")
        raise raises(told(what, f"is {kind}; expected a file", advice))


def read_text(
    path: Path,
    raises: type[GraspError] = DataError,
    what: str | None = None,
    advice: str = "",
    encoding: str = "utf-8",
) -> str:
    """Return the text of a file; utf-8-sig leaves out the byte-order mark of some editors."""
    what = what or str(path)
    check_file(path, raises, what, advice)
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text ({error.reason})"
        raise raises(told(what, reason, advice or "convert it to UTF-8")) from error
    except (OSError, MemoryError) as error:
        raise raises(told(what, f"cannot be read: {_reason(error)}", advice)) from error


def read_json(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> Any:  # noqa: ANN401  parsed JSON
    """Return the content of a JSON file, see ``parse_json``."""
    text = _read_small(path, raises, what, advice)
    return parse_json(text, what or str(path), raises, advice)


def parse_json(text: str, what: str, raises: type[GraspError] = DataError, advice: str = "") -> Any:  # noqa: ANN401  parsed JSON
    """Return the content of a JSON text; NaN and Infinity are no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise raises(told(what, f"is not JSON ({error.msg}{place})", advice)) from error
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise raises(told(what, f"is not JSON ({one_line(error)})", advice)) from error


def read_yaml(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> Any:  # noqa: ANN401  parsed YAML
    """Return the content of a YAML file, see ``parse_yaml``."""
    text = _read_small(path, raises, what, advice)
    return parse_yaml(text, what or str(path), raises, advice)


def parse_yaml(text: str, what: str, raises: type[GraspError] = DataError, advice: str = "") -> Any:  # noqa: ANN401  parsed YAML
    """Return the content of a YAML text, whose keys are texts, each of them there once."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else one_line(error)
        raise raises(told(f"{what}:", f"not valid YAML: {reason}", advice)) from error


class _Loader(yaml.SafeLoader):
    """Refuses what Python would take: keys given twice, keys that are no text, aliases of aliases.

    Depth is counted while the text is read, so that nobody waits for thousands of brackets.
    """

    _depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Return the next value."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} levels deep")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        """Return the next mapping, its keys checked before merges add others."""
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE_TAG:
                continue
            if not isinstance(key, ScalarNode) or key.tag != _TEXT_TAG:
                came = key.value if isinstance(key, ScalarNode) else "a list or section"
                raise yaml.YAMLError(f"line {line}: the key {one_line(came)} is no text; quote it")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: the key {one_line(key.value)} is given twice")
            seen.add(key.value)
        return node

    def get_single_node(self) -> Node | None:
        """Return the whole content, if it is not too much."""
        node: Node | None = super().get_single_node()
        if node is not None and _size(node, {}) > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_NODES} values, aliases counted as what they are")
        return node


def _size(node: Node, known: dict[int, int]) -> int:
    """Return the number of values of a node; an alias of what it is in has no end."""
    if id(node) not in known:
        known[id(node)] = _MAX_NODES + 1  # until it is counted: a node that is met in itself
        parts: list[Node] = []
        if isinstance(node, MappingNode):
            parts = [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _read_small(path: Path, raises: type[GraspError], what: str | None, advice: str) -> str:
    what = what or str(path)
    check_file(path, raises, what, advice)
    if path.stat().st_size > _MAX_BYTES:
        raise raises(told(what, f"has more than {_MAX_BYTES // 2**20} MB", advice))
    return read_text(path, raises, what, advice)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error)
