"""The checks of an output folder, and the lock that keeps other processes out of it."""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder.files import in_the_way, remove_folder

LOCK_NAME = ".lock"


class FolderLock:
    """An exclusive lock on an existing folder, which the system releases when the process dies.

    Raises:
        OutputError: If another process holds the lock, the folder is read-only, or something other
            than an empty file is at the lock's path.
    """

    def __init__(self, root: Path) -> None:
        self._file = root / LOCK_NAME
        try:
            self._descriptor = self._take()
        except BlockingIOError as error:
            raise OutputError(_in_use(root)) from error
        except OSError as error:
            raise OutputError(f"cannot lock {self._file}: {error.strerror}") from error

    def _take(self) -> int:
        while True:
            if self._file.is_symlink():
                raise OutputError(in_the_way(self._file))
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self._file, flags, 0o666)
            found = os.fstat(descriptor)
            if found.st_size > 0 or not stat.S_ISREG(found.st_mode):
                os.close(descriptor)
                raise OutputError(in_the_way(self._file))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous holder may have removed the file between the two calls: then no later
                # process would find the file that this lock is on.
                if self._file.exists() and os.path.samestat(found, self._file.lstat()):
                    return descriptor
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def release(self) -> None:
        """Remove the lock file and release the folder."""
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)


def check_unlocked(root: Path) -> None:
    """Raise an ``OutputError`` if another process holds the lock; write nothing."""
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no run holds it
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(_in_use(root)) from error
    finally:
        os.close(descriptor)


def _in_use(root: Path) -> str:
    return f"another process is writing to {root}; wait for it, or use another output_dir"


def check_writable(root: Path) -> None:
    """Raise the ``OutputError`` of ``make_folders`` if a folder cannot be made or written."""
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot create output_dir {root}: {os.strerror(errno.EACCES)}")


def safe_root(output_dir: str | Path, protected: Sequence[str | Path]) -> Path:
    """Return the absolute path of an output folder, links resolved, if it is safe to write.

    Args:
        protected: Folders and files that must not change; absent ones are ignored.

    Raises:
        OutputError: If the path is a file; is, contains or is inside a protected folder; or is or
            contains the home or the working directory.
    """
    try:
        root, home = Path(output_dir).expanduser().resolve(), Path.home()
    except RuntimeError as error:  # no home directory, or a loop of links
        raise OutputError(f"output_dir {output_dir}: {error}") from error
    for path in (Path(entry).expanduser() for entry in protected):
        held = path.resolve()
        if path.exists() and (held.is_relative_to(root) or root.is_relative_to(held)):
            raise OutputError(
                f"output_dir {root} is, contains or is inside {held}, which must not change; use "
                "another output_dir"
            )
    for name, folder in (("working", Path.cwd()), ("home", home)):
        if folder.resolve().is_relative_to(root):
            raise OutputError(
                f"output_dir {root} is or contains the {name} directory; use a separate folder"
            )
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(f"output_dir {root}: {existing} is a file, expected a folder")
    return root


def make_folders(root: Path) -> list[Path]:
    """Make a folder and its absent parents; return those that were made, outermost first.

    Raises:
        OutputError: If the folder cannot be made.
    """
    absent = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create output_dir {root}: {error.strerror}") from error
    return absent[::-1]


def remove_made(made: Sequence[Path]) -> None:
    """Remove those folders of ``make_folders`` that are empty."""
    for folder in reversed(made):
        remove_folder(folder.parent, folder.name, if_empty=True)
