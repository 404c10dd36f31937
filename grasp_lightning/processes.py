"""The processes of one run: how many there are, sums over them, and work that one does for all.

A run of several processes runs the same code in each of them (rank 0, 1, ...). In a run of one
process all functions here do the obvious thing.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_lightning.errors import Interrupted

T = TypeVar("T")
_left_a_group = threading.Event()


def num_processes() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if _is_group() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _is_group() else 0


def is_first() -> bool:
    """Return whether this process writes files and speaks to the user."""
    return rank() == 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Return every n-th of some items, for n processes, so that together they have each one once.

    Args:
        items: The items, the same in all processes.

    Returns:
        Those of this process, in order.
    """
    return items[rank() :: num_processes()]


def own_batches(items: Sequence[T], size: int) -> list[tuple[Sequence[T], bool]]:
    """Return the share of this process in batches, as many of them in every process.

    A pass of a model that is split over processes needs all of them.

    Args:
        items: The items, the same in all processes, at least one.
        size: Items per batch; a process's last batch with items may hold fewer.

    Returns:
        Batches, and whether they count: one that is there for the number alone repeats the first
        item.
    """
    own = own_share(items)
    batches = [(own[start : start + size], True) for start in range(0, len(own), size)]
    most_items = -(-len(items) // num_processes())
    missing = -(-most_items // size) - len(batches)
    return batches + [(items[:1], False)] * missing


def merged(own: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Return what all processes have found, each its share.

    Args:
        own: What this process has found, by name.
        names: Names of everything.

    Returns:
        All of it, in the order of ``names``; the same in all processes.
    """
    found = {name: value for part in gather(dict(own)) for name, value in part.items()}
    return {name: found[name] for name in names}


def barrier() -> None:
    """Wait until all processes are here."""
    if num_processes() > 1:
        gather(None)


def gather(value: T) -> list[T]:
    """Return a value of every process, by rank.

    Args:
        value: That of this process; it is pickled.

    Returns:
        All of them, in all processes.
    """
    if num_processes() == 1:
        return [value]
    values = [value] * num_processes()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], T]) -> T:
    """Let rank 0 do something, and return its result, or raise what it raised, in all processes.

    Args:
        work: What rank 0 does; its result is pickled.
    """
    if num_processes() == 1:
        return work()
    result: list[T] = []
    error: Exception | None = None
    if is_first():
        try:
            result.append(work())
        except Exception as raised:  # noqa: BLE001  raised again below, in every process
            error = raised
    outcome = [(result, error)]
    _told(lambda: dist.broadcast_object_list(outcome, src=0), error)
    ((result, error),) = outcome
    if error is not None:
        raise error
    return result[0]


def _told(tell: Callable[[], T], error: Exception | None) -> T:
    """Tell the other processes of an error; an interruption may have ended them already."""
    try:
        return tell()
    except RuntimeError:  # torch raises no narrower class where a process is gone
        if isinstance(error, Interrupted):
            raise error from None
        raise


def in_turns(work: Callable[[], T]) -> T:
    """Let the processes of each node do something one after the other, each for itself.

    What the work of any of them raises is raised in all.
    """
    if num_processes() == 1:
        return work()
    own_turn = int(os.environ.get("LOCAL_RANK", "0"))
    result: list[T] = []
    for turn in range(max(gather(own_turn)) + 1):
        error: Exception | None = None
        if turn == own_turn:
            try:
                result.append(work())
            except Exception as raised:  # noqa: BLE001  raised again below, in every process
                error = raised
        for failure in _told(partial(gather, error), error):
            if failure is not None:
                raise failure
    return result[0]


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums of tensors over all processes, to the bit the same in all of them.

    Args:
        tensors: Name -> tensor, the same names and shapes in all processes.

    Returns:
        Name -> sum, on the device of the tensor.
    """
    if num_processes() == 1:
        return dict(tensors)
    sums = {}
    for name, value in tensors.items():
        total = value.clone()
        dist.reduce(total, dst=0)
        sums[name] = from_rank(total, 0)
    return sums


def from_rank(tensor: Tensor, source: int) -> Tensor:
    """Return the tensor of one process.

    Args:
        tensor: That of this process, of the shape and type of the source's; it is overwritten.
        source: Rank of the process.

    Returns:
        The tensor, in all processes.
    """
    if num_processes() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def shared(value: T | None, source: int) -> T:
    """Return an object of one process.

    Args:
        value: That of this process, read in the source alone; it is pickled.
        source: Rank of the process.

    Returns:
        The object, in all processes.
    """
    values = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(values, src=source)
    (result,) = values
    assert result is not None  # the source has one
    return result


def join(device: torch.device) -> None:
    """Form a group with the other processes, as the environment names them (``RANK``, ...).

    Args:
        device: Device that this process computes on.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)


def leave() -> None:
    """Leave the group."""
    if _is_group():
        dist.destroy_process_group()
        _left_a_group.set()


def end(code: int) -> NoReturn:
    """End this process as ``sys.exit`` does; one that was in a group ends after the exit handlers.

    A group that this process is still in is left.

    A group that is destroyed keeps its threads while anything refers to it, and DTensor caches what
    does. One of them that lets go of a tensor while the interpreter is taken apart aborts the
    process (PyTorch, issue 190489), so that is left out, as ``multiprocessing`` does.

    Args:
        code: Exit code.
    """
    leave()
    if not _left_a_group.is_set():
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # joins the other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody listens any more
            stream.flush()
    os._exit(code)


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()
