"""The processes of one run: their number, sums over them, and work that one does for all.

All processes run the same code, as rank 0, 1, ...; with one process, all functions are trivial.
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
    """Return the number of cooperating processes."""
    return dist.get_world_size() if _is_group() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _is_group() else 0


def is_first() -> bool:
    """Return whether this process writes files and prints to the terminal."""
    return rank() == 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Return every n-th item, for n processes: together they have each item once."""
    return items[rank() :: num_processes()]


def own_batches(items: Sequence[T], size: int) -> list[tuple[Sequence[T], bool]]:
    """Return this process's share of at least one item, in equally many batches for all processes.

    A model that is split over processes needs all of them in each forward pass.

    Returns:
        Batches of at most ``size`` items, and whether each counts: the others only pad the number,
        with the first item.
    """
    own = own_share(items)
    batches = [(own[start : start + size], True) for start in range(0, len(own), size)]
    most_items = -(-len(items) // num_processes())
    missing = -(-most_items // size) - len(batches)
    return batches + [(items[:1], False)] * missing


def merged(own: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Return what all processes found, in the order of ``names``, the same in all of them."""
    found = {name: value for part in gather(dict(own)) for name, value in part.items()}
    return {name: found[name] for name in names}


def barrier() -> None:
    """Wait for all processes."""
    if num_processes() > 1:
        gather(None)


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank; they are pickled."""
    if num_processes() == 1:
        return [value]
    values = [value] * num_processes()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], T]) -> T:
    """Run ``work`` in rank 0; return its pickled result, or raise its error, in all processes."""
    if num_processes() == 1:
        return work()
    outcomes = [_outcome(work) if is_first() else ([], None)]
    error = outcomes[0][1]
    _told(lambda: dist.broadcast_object_list(outcomes, src=0), error)
    ((result, error),) = outcomes
    if error is not None:
        raise error
    return result[0]


def _outcome(work: Callable[[], T]) -> tuple[list[T], Exception | None]:
    """Return the result of some work or its error, to be raised again in every process."""
    try:
        return [work()], None
    except Exception as error:  # noqa: BLE001  raised again by the caller
        return [], error


def _told(tell: Callable[[], T], error: Exception | None) -> T:
    """Share an error with the other processes; an interruption may have ended them already."""
    try:
        return tell()
    except RuntimeError:  # torch raises no narrower class if a process has died
        if isinstance(error, Interrupted):
            raise error from None
        raise


def in_turns(work: Callable[[], T]) -> T:
    """Run ``work`` in the processes of each node one by one; an error of any is raised in all."""
    if num_processes() == 1:
        return work()
    own_turn = int(os.environ.get("LOCAL_RANK", "0"))
    own: list[T] = []
    for turn in range(max(gather(own_turn)) + 1):
        result, error = _outcome(work) if turn == own_turn else ([], None)
        own += result
        for failure in _told(partial(gather, error), error):
            if failure is not None:
                raise failure
    return own[0]


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums of tensors over all processes, bitwise equal in all of them.

    Names and shapes must be the same in all processes; sums stay on the device of their tensor.
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
    """Return the tensor of rank ``source``; elsewhere it overwrites one of equal shape and type."""
    if num_processes() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def shared(value: T | None, source: int) -> T:
    """Return the pickled object of rank ``source``; those of other processes are ignored."""
    values = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(values, src=source)
    (result,) = values
    assert result is not None  # the source has one
    return result


def join(device: torch.device) -> None:
    """Form a group with the processes named by the environment (``RANK``, ...)."""
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
    """Leave the group and exit; a process that was in a group ends right after the exit handlers.

    The threads of a destroyed group live while anything refers to it, and DTensor's caches do. If
    one of them frees a tensor while the interpreter shuts down, the process aborts (PyTorch issue
    190489), so the shutdown is skipped, as in ``multiprocessing``.
    """
    leave()
    if not _left_a_group.is_set():
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # joins the other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()
