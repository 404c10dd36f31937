"""Work on many weights, shared by the processes of a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.methods.base import Track
from grasp_lightning.models.sharding import whole
from grasp_lightning.stats.base import DecidedLinears

T = TypeVar("T")


def dealt(
    weights: Mapping[str, Tensor], work: Callable[[str, Tensor], T], track: Track, description: str
) -> Iterator[tuple[str, T]]:
    """Apply a function to every weight; the processes share the work and all get all results.

    The weights are the same in all processes, and the results come in their order.

    Args:
        weights: Possibly sharded weights, by name.
        work: Takes the name and the whole weight; its result is pickled.
        track: Shows the progress.
        description: The label of the progress.
    """
    if processes.num_processes() == 1:  # one by one: not all results need be in memory
        for name, weight in own_weights(weights, track, description):
            yield name, work(name, weight)
        return
    own = {name: work(name, weight) for name, weight in own_weights(weights, track, description)}
    for position, name in enumerate(weights):
        yield name, processes.shared(own.pop(name, None), position % processes.num_processes())


def kept(
    store: DecidedLinears,
    modules: Iterable[str],
    work: Callable[[str], Mapping[str, Tensor]],
    track: Track,
    description: str,
) -> dict[str, Mapping[str, Tensor]]:
    """Compute tensors for linears, and keep them out of memory; the processes share the work.

    Args:
        store: Keeps them.
        modules: Full names of the linears, the same in all processes.
        work: Takes the name of a linear.
        track: Shows the progress.
        description: Label of the progress, and of what the store keeps.

    Returns:
        The tensors of each linear, read on access.
    """
    names = tuple(modules)
    store.claim(description, names)
    for name in track(processes.own_share(names), description):
        store.save(description, name, work(name))
    return store.load(description, names)


def own_weights(
    weights: Mapping[str, Tensor], track: Track, description: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole weight ``(N, M)`` of every n-th weight, for n processes.

    All processes gather the sharded weights one by one, and the owner of each keeps it: they
    compute at the same time, and none holds two weights.
    """
    names, number = list(weights), processes.num_processes()
    for turn, _ in enumerate(track(names[::number], description)):
        group = names[turn * number :][:number]
        kept: list[tuple[str, Tensor]] = []
        for owner, name in enumerate(group):
            weight = whole(weights[name])
            if owner == processes.rank():
                kept.append((name, weight))
        yield from kept
