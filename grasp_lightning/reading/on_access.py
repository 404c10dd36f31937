"""Mappings whose values are read on each access, so that not all of them are in memory."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class OnAccess(Mapping[str, T]):
    """Values by name, each returned by a function that is called on every access.

    Args:
        readers: The functions, by name.
    """

    def __init__(self, readers: Mapping[str, Callable[[], T]]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> T:
        """Read the value of a name."""
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        """Return whether a name has a value, without reading it."""
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._readers)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._readers)


def merged(*parts: Mapping[str, T]) -> Mapping[str, T]:
    """Return a view of several mappings, which reads on access; of equal names the last counts."""
    return OnAccess({name: partial(part.__getitem__, name) for part in parts for name in part})


def by_full_name(found: Mapping[str, Mapping[str, T]], *parts: str) -> Mapping[str, T]:
    """Return some parts of several modules by ``<module>.<part>``, read on access."""
    return OnAccess(
        {
            f"{module}.{part}": partial(own.__getitem__, part)
            for module, own in found.items()
            for part in parts
        }
    )
