"""The cells of a grid, in order, and the share of one of several commands that work on it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from grasp_lightning.config import (
    METHOD_OPTIONS,
    CompareConfig,
    MethodConfig,
    SpeedConfig,
    TasksConfig,
)
from grasp_lightning.errors import ConfigError, DataError, ModelError
from grasp_lightning.methods import resolve_method
from grasp_lightning.plugins import method_plugins
from grasp_lightning.reporting.comparison.results import DENSE

_PART = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a grid; the attributes match ``CellResult``.

    Attributes:
        after: The trainings before ``compensation``, in order.
    """

    model: str
    method: str = DENSE
    removed_ratio: float | None = None
    seed: int = 0
    compensation: str | None = None
    after: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether it is the model before compression."""
        return self.method == DENSE

    @property
    def is_trained(self) -> bool:
        """Whether it is trained after compression."""
        return self.compensation is not None

    @property
    def base(self) -> "Cell":
        """The same cell before all training."""
        return replace(self, compensation=None, after=())

    @property
    def start(self) -> "Cell":
        """The cell whose model it is trained from."""
        if not self.after:
            return self.base
        return replace(self, compensation=self.after[-1], after=self.after[:-1])

    @property
    def name(self) -> str:
        """Name of its files, and in messages."""
        parts = [self.model, self.method]
        if self.removed_ratio is not None:
            parts.append(f"{self.removed_ratio:g}")
        if not self.is_dense:
            parts.append(f"seed{self.seed}")
        if self.compensation is not None:
            parts.append(self.compensation)
        return folder_name("-".join(parts))


def folder_name(text: str) -> str:
    """Return a name as that of a file, without other characters than letters, digits and -_.=."""
    return re.sub(r"[^\w.=-]+", "-", text)


def unknown_methods(config: CompareConfig) -> list[str]:
    """Return the names in the configuration of methods that do not exist."""
    known = {*METHOD_OPTIONS, *method_plugins()}
    return [name for name, method in config.methods.items() if method.name not in known]


def grid_cells(config: CompareConfig) -> tuple[Cell, ...]:
    """Return all cells, for each model the dense one first; methods that do not exist have none.

    Raises:
        ConfigError: If a method or its size is wrong, with the key, or the grid is empty.
    """
    _check_names(config)
    _check_vocabularies(config)
    _check_numbers(config)
    absent = unknown_methods(config)
    if absent and not config.skip_unknown:
        name = absent[0]
        with renamed("method", f"methods.{name}"):
            resolve_method(config.methods[name])
    methods = [name for name in config.methods if name not in absent]
    cells = tuple(cell for model in config.models for cell in _of_model(config, model, methods))
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise ConfigError(
                f"two cells of the grid would be named {cell.name}; use other names for models, "
                "methods or compensations"
            )
        if not cell.is_dense:
            with renamed("method", f"methods.{cell.method}"):
                resolve_method(method_of(config, cell))
    return cells


def _of_model(config: CompareConfig, model: str, methods: Sequence[str]) -> Iterator[Cell]:
    yield Cell(model=model, seed=config.seeds[0])
    own = [name for name in methods if _sets_own_size(config.methods[name])]
    sized: list[tuple[float | None, str]] = [(None, name) for name in own]
    sized += [
        (ratio, name) for ratio in config.removed_ratios for name in methods if name not in own
    ]
    for ratio, name in sized:
        for seed in config.seeds:
            cell = Cell(model=model, method=name, removed_ratio=ratio, seed=seed)
            yield cell
            trainings = [
                replace(cell, compensation=name, after=_earlier(config, name))
                for name in config.compensations
            ]
            yield from sorted(trainings, key=lambda trained: len(trained.after))


def _earlier(config: CompareConfig, training: str) -> tuple[str, ...]:
    """Return the trainings that come before one, in order.

    Raises:
        ConfigError: If one of them does not exist, or starts from itself.
    """
    recipes, names = config.compensations, [training]
    while (after := recipes[names[-1]].after) is not None:
        if after not in recipes or after in names:
            others = [other for other in recipes if other not in names]
            raise ConfigError(
                f"compensations.{names[-1]}.after: expected the name of another entry that does "
                f"not start from this one ({', '.join(others) or 'there is none'}), got {after!r}"
            )
        names.append(after)
    return tuple(reversed(names[1:]))


def method_of(config: CompareConfig, cell: Cell) -> MethodConfig:
    """Return the options of a cell's method, with its size."""
    method = config.methods[cell.method]
    ratio = cell.removed_ratio
    return method if ratio is None else replace(method, removed_ratio=ratio)


def _sets_own_size(method: MethodConfig) -> bool:
    """Return whether a method is complete without a ``removed_ratio`` of the grid.

    A ``keep_ratio`` alone is a size for some methods, and for others only half of it.
    """
    sizes = (method.removed_ratio, method.num_layers, method.layers)
    if any(size is not None for size in sizes) or method.pattern not in (None, "unstructured"):
        return True
    if method.keep_ratio is None:
        return False
    try:
        resolve_method(method)
    except ConfigError:
        return False
    return True


def is_asked(section: TasksConfig | SpeedConfig, cell: Cell) -> bool:
    """Return whether a section measures a cell; always if no share was requested for it."""
    ratios = section.removed_ratios
    return ratios is None or cell.removed_ratio is None or cell.removed_ratio in ratios


@contextmanager
def renamed(section: str, place: str) -> Iterator[None]:
    """In errors, name a section of a single command by its place in the grid's configuration."""
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        text = re.sub(rf"\b{section}([.:])", rf"{place}\1", str(error))
        raise type(error)(text) from error


def _check_names(config: CompareConfig) -> None:
    for key in ("models", "methods", "texts", "seeds", "removed_ratios"):
        if not getattr(config, key):
            raise ConfigError(f"{key} is empty; a grid needs at least one")
    for key in ("models", "methods", "compensations"):
        for name in getattr(config, key):
            if not name[:1].isalnum():
                raise ConfigError(f"{key}: expected names that begin with a letter, got {name!r}")
    for name in config.compensations:
        _earlier(config, name)  # refuses what has no order
    if DENSE in config.methods:
        raise ConfigError(
            f"methods.{DENSE}: this name is the model before compression; use another"
        )


def _check_vocabularies(config: CompareConfig) -> None:
    trimming = [name for name, method in config.methods.items() if method.vocabulary == "corpus"]
    if trimming:
        raise ConfigError(
            f"methods.{trimming[0]}.vocabulary is corpus, but a grid reads all texts with one "
            "tokenizer; trim first, and name the trimmed model in models"
        )


def _check_numbers(config: CompareConfig) -> None:
    for key in ("seeds", "removed_ratios"):
        values = getattr(config, key)
        if len(set(values)) < len(values):
            raise ConfigError(f"{key} contains a value more than once")
    for key in ("tasks", "speed"):
        ratios = getattr(config, key).removed_ratios or ()
        for ratio in ratios:
            if ratio not in config.removed_ratios:
                raise ConfigError(
                    f"{key}.removed_ratios contains {ratio:g}, which is not in removed_ratios"
                )


def share_of(cells: Sequence[Cell], part: str | None) -> tuple[Cell, ...]:
    """Return the cells that one of several commands runs, such as ``3/16``; None for all.

    All parts together have each cell once. A trained cell is in the part of its base, and the cells
    of a method are together, so that few parts need the same statistics.

    Raises:
        ConfigError: If the part is not one of those that it counts.
    """
    if part is None:
        return tuple(cells)
    found = _PART.fullmatch(part)
    index, count = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise ConfigError(f"cells: expected a part such as 3/16, the third of 16, got {part!r}")
    bases = [cell for cell in cells if not cell.is_trained]
    order = {name: place for place, name in enumerate(dict.fromkeys(c.method for c in bases))}
    bases.sort(key=lambda cell: (cell.model, cell.seed, order[cell.method]))
    start, end = ((number * len(bases)) // count for number in (index - 1, index))
    own = set(bases[start:end])
    return tuple(cell for cell in cells if cell.base in own)
