"""Files that are whole or absent, written without following a link.

A file is built under a random name in the folder that it belongs to, and takes its place when it is
complete. Folders are opened one by one from the run folder on, and paths are relative to them, so
that a link that lies in the way is an error and not a way out.
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
    """Turn a full disk or a missing permission into one line.

    Args:
        path: What is written.

    Yields:
        Nothing; the block writes.

    Raises:
        OutputError: If the block fails to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error


def in_the_way(path: Path) -> str:
    """Return what is told of something that no run wrote, where a run is going to write."""
    return (
        f"{path} was not written by this program and is in the way; move it, or use another "
        f"output_dir"
    )


def partial_name(name: str) -> str:
    """Return a random name to build a file under; the suffix stays, since some writers go by it."""
    return f".partial.{secrets.token_hex(8)}{PurePosixPath(name).suffix}"


@contextmanager
def opened_folder(root: Path, name: str = "") -> Iterator[int]:
    """Open a folder in a run folder; a link on the way is an ``OSError``.

    Args:
        root: The run folder; it may be reached by links itself.
        name: Relative path, ``/`` between parts.

    Yields:
        Its descriptor.
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
    """Write a file that takes its place when it is complete; failing is an ``OutputError``.

    Args:
        target: Its place; missing folders are made. A link there is replaced, not followed.
        write: Writes one file at the path that it is given, where an empty one is already.
        root: The run folder, below which no link is followed; None where there is none.
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


def replace_synced(temporary: str, name: str, folder: int) -> None:
    """Move a complete file to its place, after its bytes have reached the disk.

    Args:
        temporary: Name of the complete file.
        name: Name of its place.
        folder: Descriptor of the folder of both.
    """
    sync(temporary, folder)
    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def sync(name: str | Path, folder: int | None = None) -> None:
    """Give a complete file or folder the usual permissions, and wait until it is on the disk.

    Args:
        name: Any regular file or folder.
        folder: Descriptor of the folder of a relative name.
    """
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        # safetensors writes files that only their owner can read; run folders are shared.
        os.fchmod(descriptor, (0o777 if is_folder else 0o666) & ~_UMASK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(root: Path, name: str) -> None:
    """Delete a file or a link, unless it is absent, a folder, or behind a link.

    Args:
        root: The run folder.
        name: Relative path.
    """
    path = PurePosixPath(name)
    with _unless_absent(), opened_folder(root, str(path.parent)) as folder:
        if not _is_folder(path.name, folder):
            os.unlink(path.name, dir_fd=folder)


def remove_folder(root: Path, name: str, *, if_empty: bool = False) -> None:
    """Delete a folder, unless it is absent, a link, or behind a link.

    Args:
        root: The run folder.
        name: Relative path.
        if_empty: Leave it where it holds anything; else delete that too.
    """
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
    """Delete the half-written files that a killed process has left in a folder.

    Args:
        root: The run folder.
        name: Relative path of the folder; nothing is done if it is absent or behind a link.
    """
    with _unless_absent(), opened_folder(root, name) as folder, os.scandir(folder) as entries:
        for entry in [entry for entry in entries if is_partial(entry)]:
            os.unlink(entry.name, dir_fd=folder)


def is_partial(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a regular file of this user's, under a name that ``partial_name`` gives.

    No other file is taken for one that a killed process has left half written.
    """
    is_named = _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
    return bool(is_named) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()


def _is_folder(name: str, folder: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


@contextmanager
def _unless_absent() -> Iterator[None]:
    """Leave the block where something is absent, or a link in place of a folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
