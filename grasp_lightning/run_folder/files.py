"""Atomic writes that follow no links.

A file is written under a random name in its folder and moved into place once complete. Folders are
opened one by one from the run folder down, with relative paths, so a link cannot lead out of it.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from grasp_lightning.errors import OutputError

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PARTIAL = re.compile(r"\.partial\.[0-9a-f]{16}(\.\w+)?")


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turn a failed write, such as on a full disk, into an ``OutputError`` of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error


def in_the_way(path: Path) -> str:
    """Return the message about a foreign file at a path that a run would write."""
    return (
        f"{path} already exists and was not written by this program; move it, or use another "
        "output_dir"
    )


def partial_name(name: str) -> str:
    """Return a random temporary name; it keeps the suffix, which some writers depend on."""
    return f".partial.{secrets.token_hex(8)}{PurePosixPath(name).suffix}"


@contextmanager
def opened_folder(root: Path, name: str = "") -> Iterator[int]:
    """Open a folder in a run folder and yield its descriptor; a link on the way raises ``OSError``.

    Args:
        root: The run folder; its own path may contain links.
        name: Relative path, ``/`` between parts.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in PurePosixPath(name).parts:
            inner = os.open(part, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def write_file(target: Path, write: Callable[[Path], object], *, root: Path | None = None) -> None:
    """Write a file atomically; a failure raises ``OutputError``.

    Args:
        target: Its place; missing folders are made. A link there is replaced, not followed.
        write: Writes to the given path, where an empty file exists already.
        root: The run folder, below which no link is followed; None takes the target's folder.
    """
    with as_output_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        root = root or target.parent
        with opened_folder(root, target.parent.relative_to(root).as_posix()) as folder:
            temporary = partial_name(target.name)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            os.close(os.open(temporary, flags, mode=0o600, dir_fd=folder))
            try:
                write(target.parent / temporary)
                replace_synced(temporary, target.name, folder)
            finally:
                with _unless_absent():
                    os.unlink(temporary, dir_fd=folder)


def link(source: Path, target: Path) -> None:
    """Replace a file by a hard link to another, or by a copy where that is not possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def replace_synced(temporary: str, name: str, folder: int) -> None:
    """Move a complete file into place in an open folder, once its bytes are on the disk."""
    sync(temporary, folder)
    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def sync(name: str | Path, folder: int | None = None) -> None:
    """Give a complete file or folder the usual permissions, and flush it to the disk."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        # safetensors writes files that only their owner can read; run folders are shared.
        os.fchmod(descriptor, (0o777 if is_folder else 0o666) & ~_UMASK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(root: Path, name: str) -> None:
    """Delete a file or a link, unless it is absent, a folder, or behind a link."""
    path = PurePosixPath(name)
    with _unless_absent(), opened_folder(root, str(path.parent)) as folder:
        if not _is_folder(path.name, folder):
            os.unlink(path.name, dir_fd=folder)


def remove_folder(root: Path, name: str, *, if_empty: bool = False) -> None:
    """Delete a folder (``if_empty``: only an empty one), unless it is absent or behind a link."""
    path = PurePosixPath(name)
    with _unless_absent(), opened_folder(root, str(path.parent)) as folder:
        if not if_empty and _is_folder(path.name, folder):
            shutil.rmtree(path.name, dir_fd=folder)
        elif if_empty:
            with opened_folder(root, name) as inner, os.scandir(inner) as entries:
                is_empty = next(entries, None) is None
            if is_empty:
                os.rmdir(path.name, dir_fd=folder)


def remove_partials(root: Path, name: str = "") -> None:
    """Delete the partial files of a killed process from a folder that is not behind a link."""
    with _unless_absent(), opened_folder(root, name) as folder, os.scandir(folder) as entries:
        for entry in [entry for entry in entries if is_partial(entry)]:
            os.unlink(entry.name, dir_fd=folder)


def is_partial(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is this user's file from ``partial_name``; all others are foreign."""
    is_named = _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
    return bool(is_named) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()


def _is_folder(name: str, folder: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


@contextmanager
def _unless_absent() -> Iterator[None]:
    """Leave the block if a path is absent, or has a link instead of a folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
