"""One command in a process of its own, whose memory the operating system limits."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from grasp_lightning.cli import main
from grasp_lightning.errors import GraspError
from grasp_lightning.evaluation.peak_memory import lifetime_peak_bytes

_CONTROLLERS: Final = Path("/sys/fs/cgroup")
_LIMITS: Final = ("memory.limit_in_bytes", "memory.max")  # of version 1 and 2
_PEAKS: Final = ("memory.memsw.max_usage_in_bytes", "memory.peak")


def run_limited(arguments: Sequence[str], limit: int) -> dict[str, float]:
    """Run a command of ``grasp`` in a fresh process, in a control group with a limit.

    Page cache counts in the group, but the kernel frees it first. A process that needs more is
    killed.

    Args:
        arguments: The command.
        limit: Bytes.

    Returns:
        ``code``, ``seconds`` and ``peak_bytes``, the largest resident set.

    Raises:
        GraspError: If control groups cannot be made, which takes root, or the process was killed.
    """
    with _group(limit) as group:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(tuple(arguments), group, sender))
        process.start()
        sender.close()
        try:
            found: dict[str, float] = receiver.recv()
        except EOFError:
            process.join()
            raise GraspError(
                f"grasp {arguments[0]} was killed: it needs more than {limit / 1e9:.1f} GB"
            ) from None
        process.join()
    return found


@contextmanager
def _group(limit: int) -> Iterator[Path]:
    """Make a control group of memory inside that of this process, and remove it at the end."""
    try:
        group = _own_group() / f"grasp-{os.getpid()}-{time.monotonic_ns()}"
        group.mkdir()
        file = next(group / name for name in _LIMITS if (group / name).exists())
        file.write_text(str(limit), encoding="ascii")
    except (OSError, StopIteration) as error:
        raise GraspError(f"cannot limit memory by a control group: {error}; run as root") from error
    try:
        yield group
    finally:
        group.rmdir()


def _own_group() -> Path:
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    groups = {kind: path.lstrip("/") for _, kind, path in (line.split(":", 2) for line in lines)}
    if "memory" in groups:
        return _CONTROLLERS / "memory" / groups["memory"]
    return _CONTROLLERS / groups[""]


def _run(arguments: Sequence[str], group: Path, sender: Connection) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    start = time.perf_counter()
    code = main(list(arguments))
    seconds = time.perf_counter() - start
    sender.send({"code": code, "seconds": seconds, "peak_bytes": lifetime_peak_bytes()})
    sender.close()
