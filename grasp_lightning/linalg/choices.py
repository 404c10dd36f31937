"""The options of matrices, MLPs and layers, with their sizes and predicted losses.

See ``linalg.allocation`` for the legend, and for the search among the options.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Union

import torch
from torch import Tensor

from grasp_lightning.linalg.ranks import largest_useful_rank


@dataclass(frozen=True, eq=False)
class MatrixChoice:
    """One matrix, and its options: factors of some rank, or dense.

    Attributes:
        name: Unique among all choices of an allocation.
        shape: Outputs and inputs ``(m, n)``.
        squared_singular_values: Predicted loss of dropping each component, descending, not
            negative, ``(K,)``, any float dtype, in one unit for all choices. Components after the
            last cost nothing.
        min_rank: Smallest rank allowed, at least 1; rounded up to ``multiple_of``.
        max_rank: Largest rank allowed, 0 if the matrix must stay dense; None allows every rank with
            fewer parameters than dense.
        multiple_of: Ranks are multiples of this number.
    """

    name: str
    shape: tuple[int, int]
    squared_singular_values: Tensor
    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1


@dataclass(frozen=True, eq=False)
class ChannelChoice:
    """One MLP, and its options: fewer hidden channels, or dense.

    Attributes:
        name: Unique among all choices of an allocation.
        channel_size: Size ``c`` of one channel, positive.
        losses: Predicted additional loss of removing each channel after all later ones, descending,
            not negative, one per channel, any float dtype.
        min_channels: Smallest number allowed, at least 1; rounded up to ``multiple_of``.
        multiple_of: Numbers of channels are multiples of this number.
    """

    name: str
    channel_size: float
    losses: Tensor
    min_channels: int = 1
    multiple_of: int = 1


@dataclass(frozen=True, eq=False)
class GroupChoice:
    """Matrices that are kept or removed together, as those of a decoder layer or a block in it.

    Attributes:
        name: Unique among all choices of an allocation.
        removal_loss: Measured loss of removing the whole group, in the unit of all losses; may
            be negative. None if the group must stay.
        own_size: Size of the group outside its children, such as norms; removed with it.
        removed_size: Size that remains after the removal, such as biases; not negative.
    """

    name: str
    children: Sequence[Union[MatrixChoice, ChannelChoice, "GroupChoice"]]
    removal_loss: float | None = None
    own_size: float = 0.0
    removed_size: float = 0.0


Choice = MatrixChoice | ChannelChoice | GroupChoice


class Curve:
    """Options of one matrix or MLP, and the lower convex hull of their losses over their sizes.

    Options ascend by size, and the last one is dense. Tails of descending values are convex, so the
    hull runs along the ranks up to some rank, and from there straight to dense.

    Attributes:
        ranks: Rank, or number of channels, of every option but dense.
        sizes: Size of every option.
        losses: Loss of every option; 0 for dense.
        hull: Options on the hull.
        slopes: Change of the loss per size between neighbours on the hull, ascending up to 0.
    """

    def __init__(self, choice: MatrixChoice | ChannelChoice) -> None:
        _check_curve(choice)
        self.choice, self.name = choice, choice.name
        if isinstance(choice, MatrixChoice):
            unit_size: float = sum(choice.shape)
            dense_size: float = math.prod(choice.shape)
            values, least = choice.squared_singular_values, choice.min_rank
            top = largest_useful_rank(*choice.shape)
            top = top if choice.max_rank is None else min(top, choice.max_rank)
        else:
            unit_size, dense_size = choice.channel_size, len(choice.losses) * choice.channel_size
            values, least, top = choice.losses, choice.min_channels, len(choice.losses) - 1
        values, unit = values.detach().double().cpu(), choice.multiple_of
        self.ranks = range(-(-least // unit) * unit, top + 1, unit)
        tails = torch.zeros(max(top, values.numel()) + 1, dtype=torch.float64)
        tails[: values.numel()] = values.flip(0).cumsum(0).flip(0)
        self.sizes: list[float] = [k * unit_size for k in self.ranks]
        self.sizes.append(float(dense_size))
        self.losses: list[float] = [*tails[list(self.ranks)].tolist(), 0.0]
        self.hull, self.slopes = self._lower_hull()

    def saved_per_size(self, start: int, end: int) -> float:
        """Return the loss that a larger option saves per size."""
        saved = self.losses[start] - self.losses[end]
        return saved / (self.sizes[end] - self.sizes[start])

    def at(self, multiplier: float) -> int:
        """Return the option that minimises ``loss + multiplier size``; ties take the smaller."""
        return self.hull[bisect_left(self.slopes, -multiplier)]

    def larger(self, option: int) -> Iterator[int]:
        """Yield the options that may save most per size after this one: the next, and dense."""
        dense = len(self.ranks)
        if option + 1 < dense:
            yield option + 1
        if option < dense:
            yield dense

    def _lower_hull(self) -> tuple[list[int], list[float]]:
        dense = len(self.ranks)
        if dense == 0:
            return [0], []
        last = min(range(dense), key=lambda option: self.saved_per_size(option, dense))
        hull = [*range(last + 1), dense]
        slopes = (-self.saved_per_size(start, end) for start, end in pairwise(hull))
        # Rounding of the tails may leave neighbouring slopes out of order by one bit.
        return hull, list(accumulate(slopes, max))


class Group(NamedTuple):
    """A group with the curves of its matrices, sorted by name."""

    choice: GroupChoice
    children: "tuple[Curve | Group, ...]"


def prepared(choices: Sequence[Choice]) -> Group:
    """Return the choices as one group that must stay; malformed ones are a ``ValueError``."""
    names: set[str] = set()

    def node(choice: Choice) -> "Curve | Group":
        if choice.name in names:
            raise ValueError(f"matrices and groups need distinct names, got {choice.name!r} twice")
        names.add(choice.name)
        return group(choice) if isinstance(choice, GroupChoice) else Curve(choice)

    def group(choice: GroupChoice) -> Group:
        sizes = (choice.own_size, choice.removed_size)
        is_finite = all(0 <= size < math.inf for size in sizes)
        if not (is_finite and math.isfinite(choice.removal_loss or 0)):
            raise ValueError(
                f"{choice.name} must have a finite removal_loss or None, got "
                f"{choice.removal_loss}, and finite own_size and removed_size of at least 0, got "
                f"{choice.own_size} and {choice.removed_size}"
            )
        children = sorted(choice.children, key=lambda child: child.name)
        return Group(choice, tuple(node(child) for child in children))

    return group(GroupChoice("", choices))


def dense_size(group: Group) -> float:
    """Return the size of everything in a group, dense."""
    sizes = [
        child.sizes[-1] if isinstance(child, Curve) else dense_size(child)
        for child in group.children
    ]
    return math.fsum([group.choice.own_size, *sizes])


def _check_curve(choice: MatrixChoice | ChannelChoice) -> None:
    is_matrix = isinstance(choice, MatrixChoice)
    field = "squared_singular_values" if is_matrix else "losses"
    values: Tensor = getattr(choice, field)
    is_vector = values.ndim == 1 and values.numel() > 0
    if not is_vector or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(
            f"{field} of {choice.name} must be a vector of finite numbers that are not negative, "
            f"got shape {tuple(values.shape)}"
        )
    if bool((values[1:] > values[:-1]).any()):
        raise ValueError(f"{field} of {choice.name} must be descending")
    for count in ("min_rank" if is_matrix else "min_channels", "multiple_of"):
        if getattr(choice, count) < 1:
            raise ValueError(
                f"{count} of {choice.name} must be at least 1, got {getattr(choice, count)}"
            )
    if isinstance(choice, ChannelChoice) and not 0 < choice.channel_size < math.inf:
        raise ValueError(
            f"channel_size of {choice.name} must be positive and finite, got {choice.channel_size}"
        )
