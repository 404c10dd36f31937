"""Work on many weights, dealt out to the processes of a run."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.methods.base import Track
from grasp_lightning.models.sharding import whole

T = TypeVar("T")


def dealt(
    weights: Mapping[str, Tensor],
    work: Callable[[str, Tensor], T],
    track: Track,
    description: str,
) -> Iterator[tuple[str, T]]:
    """Yield what some work gives for every weight; several processes share it.

    Args:
        weights: All weights, the same in all processes.
        work: From the name of a weight and the whole weight to a result, which is pickled.
        track: Shows the progress.
        description: What is done.

    Yields:
        Name and result, in the order of the weights, in all processes.
    """
    own = {name: work(name, weight) for name, weight in own_weights(weights, track, description)}
    for position, name in enumerate(weights):
        yield name, processes.shared(own.pop(name, None), position % processes.num_processes())


def own_weights(
    weights: Mapping[str, Tensor], track: Track, description: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that this process works on: every n-th of them, for n processes.

    A sharded weight is brought together by all, one after the other, and kept by its owner: so they
    work at the same time, and none holds two weights.

    Args:
        weights: All weights, the same in all processes.
        track: Shows the progress.
        description: What is done.

    Yields:
        Name and whole weight, ``(N, M)``.
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
