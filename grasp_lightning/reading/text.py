"""Paths, text and JSON from the user; every error is one line.

Arguments: ``raises``, the class of ``errors`` to raise; ``what``, the file's name in messages
(None: its path); ``advice``, what to do, for the end of the message. No torch and no YAML here.
"""

import errno
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from grasp_lightning.errors import DataError, GraspError

_MAX_BYTES = 2**28  # of a YAML or JSON file; the largest plans have some megabytes
_MAX_QUOTED = 200  # characters of a library's message
_CONVERT = "convert it to UTF-8"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def one_line(error: BaseException | str) -> str:
    """Return the text of an error on one line, cut to a readable length; else its class."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]} ..."


def told(what: object, reason: str, advice: str = "") -> str:
    """Return the line that says what is wrong with something, and what to do."""
    return f"{what} {reason}{f'; {advice}' if advice else ''}"


def user_path(text: str, key: str, raises: type[GraspError] = DataError) -> Path:
    """Return the path that a key names, ``~`` expanded; refuse text that cannot be a path."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise raises(f"{key}: {one_line(text)}: {user} has no home folder") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise raises(f"{key}: {text!r:.{_MAX_QUOTED}} is not a path: {one_line(error)}") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise raises(f"{key}: {one_line(text)}: {_reason(error)}") from error
    return path


def is_there(text: str) -> bool:
    """Return whether a text is the path of something that exists."""
    try:
        Path(text).stat()
    except (OSError, ValueError):
        return False
    return True


def check_file(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> None:
    """Refuse anything but a regular file: reading a FIFO or a device might never end."""
    what = what or str(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            reason = f"a link to {path.readlink()}, which does not exist"
        raise raises(told(what, f"cannot be read: {reason}", advice)) from error
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "not a file")
        raise raises(told(what, f"is {kind}; expected a file", advice))


def read_text(
    path: Path,
    raises: type[GraspError] = DataError,
    what: str | None = None,
    advice: str = "",
    encoding: str = "utf-8",
) -> str:
    """Return the text of a file; utf-8-sig drops the byte-order mark of some editors."""
    what = what or str(path)
    check_file(path, raises, what, advice)
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text ({error.reason})"
        raise raises(told(what, reason, advice or _CONVERT)) from error
    except (OSError, MemoryError) as error:
        raise raises(told(what, f"cannot be read: {_reason(error)}", advice)) from error


def read_small(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> str:
    """Return the text of a YAML or JSON file, which may not be huge."""
    what = what or str(path)
    check_file(path, raises, what, advice)
    if path.stat().st_size > _MAX_BYTES:
        raise raises(told(what, f"has more than {_MAX_BYTES // 2**20} MB", advice))
    return read_text(path, raises, what, advice)


def read_json(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> Any:  # noqa: ANN401  parsed JSON
    """Return the content of a JSON file, see ``parse_json``."""
    text = read_small(path, raises, what, advice)
    return parse_json(text, what or str(path), raises, advice)


def read_json_lines(
    path: Path, raises: type[GraspError] = DataError, advice: str = "expected one object per line"
) -> Iterator[tuple[int, Any]]:  # Any: parsed JSON
    """Yield number (from 1) and content of every line that is not blank."""
    check_file(path, raises)
    try:
        # The file is split at line feeds only: JSON strings may hold other separators unescaped.
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield number, parse_json(line, place, raises, advice, is_strict=False)
    except UnicodeDecodeError as error:
        raise raises(told(path, f"is not UTF-8 text ({error.reason})", _CONVERT)) from error
    except OSError as error:
        raise raises(told(path, f"cannot be read: {_reason(error)}")) from error


def parse_json(
    text: str,
    what: str,
    raises: type[GraspError] = DataError,
    advice: str = "",
    *,
    is_strict: bool = True,
) -> Any:  # noqa: ANN401  parsed JSON
    """Return the content of a JSON text; NaN and Infinity only pass if not ``is_strict``."""
    try:
        return json.loads(text, parse_constant=_refuse_constant if is_strict else None)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise raises(told(what, f"is not JSON ({error.msg}{place})", advice)) from error
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise raises(told(what, f"is not JSON ({one_line(error)})", advice)) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error)
