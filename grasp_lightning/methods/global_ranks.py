"""One budget for all matrices and MLPs, spent where it hurts least."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from grasp_lightning.config import BudgetChoice, MlpChoice
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.allocation import (
    Allocation,
    ChannelChoice,
    MatrixChoice,
    allocate,
    smallest_size,
)
from grasp_lightning.methods.narrowing import Narrowable
from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.plan import OptionValue
from grasp_lightning.stats.base import LinearSeconds, Shape

_NOT_MEASURED: Final[Mapping[Shape, LinearSeconds]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Budgeted:
    """What shares a budget.

    Attributes:
        shapes: ``(N, M)`` of every matrix that may be cut, by module.
        mlps: Every MLP that may lose channels, by the name of its reader; its linears are not among
            the matrices.
    """

    shapes: Shapes
    mlps: Mapping[str, Narrowable] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the linears that must be measured."""
        return (*self.shapes, *self.mlps)

    @property
    def size(self) -> int:
        """Number of parameters of all of it."""
        matrices = sum(rows * columns for rows, columns in self.shapes.values())
        return matrices + sum(m.num_channels * m.channel_size for m in self.mlps.values())

    @property
    def linear_shapes(self) -> tuple[Shape, ...]:
        """The shapes of all its linears, sorted, each one once."""
        inside = {shape for mlp in self.mlps.values() for shape in mlp.shapes}
        return tuple(sorted({*self.shapes.values(), *inside}))

    def channel_seconds(self, mlp: str, seconds: Mapping[Shape, LinearSeconds]) -> float:
        """Return the time of one channel of an MLP.

        Args:
            mlp: Name of its reader.
            seconds: Time of linears by shape.

        Returns:
            The time of its dense linears over the number of its channels.
        """
        dense = math.fsum(seconds[shape].dense for shape in self.mlps[mlp].shapes)
        return dense / self.mlps[mlp].num_channels

    def dense_seconds(self, seconds: Mapping[Shape, LinearSeconds]) -> float:
        """Return the time of all linears, dense.

        Args:
            seconds: Time of linears by shape.

        Returns:
            The sum.
        """
        inside = (shape for mlp in self.mlps.values() for shape in mlp.shapes)
        return math.fsum(seconds[shape].dense for shape in (*self.shapes.values(), *inside))


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalRanks:
    """Ranks and channels of the smallest predicted loss under one budget: some stay dense.

    All losses must have one unit, which ``kfac`` gives. With one Lagrange multiplier for all, each
    matrix takes the rank, and each MLP the number of channels, that minimises its loss plus the
    multiplier times its size.

    Attributes:
        removed_ratio: Share of all the model's parameters that goes; None if ``keep_ratio`` is set.
        keep_ratio: Share of the parameters of the chosen layers' linears that stays.
        num_parameters: Parameters of the whole dense model.
        multiple_of: Ranks and numbers of channels are multiples of this number.
        mlp: Whether MLPs lose channels, or their matrices become factors like all others.
        unit: What the budget counts: parameters, or the measured time of linears. Time counts as
            many units as there are parameters, so that a ratio removes the share of the time that
            it would remove of the parameters.
    """

    removed_ratio: float | None = None
    keep_ratio: float | None = None
    num_parameters: int
    multiple_of: int = 1
    mlp: MlpChoice = "factors"
    unit: BudgetChoice = "parameters"

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the decisions depend on, for the plan."""
        key = "keep_ratio" if self.removed_ratio is None else "removed_ratio"
        options: dict[str, OptionValue] = {
            key: getattr(self, key),
            "ranks": "global",
            "mlp": self.mlp,
        }
        if self.multiple_of != 1:
            options["multiple_of"] = self.multiple_of
        return options if self.unit == "parameters" else {**options, "budget": self.unit}

    def allocation(
        self,
        budgeted: Budgeted,
        losses: Mapping[str, Tensor],
        seconds: Mapping[Shape, LinearSeconds] = _NOT_MEASURED,
    ) -> Allocation:
        """Return the rank of every matrix, and the channels of every MLP, that gets smaller.

        Args:
            budgeted: What shares the budget.
            losses: Predicted loss of dropping each component of a matrix, ``(K,)`` by module, and
                of each channel of an MLP, ``(I,)`` by reader; descending.
            seconds: Time of linears by shape, for a budget of time.

        Returns:
            Ranks by module, and channels by reader.
        """
        choices = self._choices(budgeted, losses, seconds)
        return allocate(choices, self._budget(budgeted, smallest_size(choices)))

    def budget(self, budgeted: Budgeted) -> int:
        """Return how much the matrices and MLPs may keep, as far as shapes tell.

        How little time they can take is known when it is measured, and checked then.

        Args:
            budgeted: What shares the budget.

        Returns:
            Number of parameters; of a budget of time, the same share of the time of everything
            dense, which counts as much as its parameters. One that is out of reach is a
            ``ConfigError`` that names the feasible range.
        """
        if self.unit == "time":
            return self._budget(budgeted, 0)
        losses = dict.fromkeys(budgeted.shapes, torch.zeros(1))
        losses |= {name: torch.zeros(mlp.num_channels) for name, mlp in budgeted.mlps.items()}
        return self._budget(budgeted, smallest_size(self._choices(budgeted, losses, _NOT_MEASURED)))

    def _choices(
        self,
        budgeted: Budgeted,
        losses: Mapping[str, Tensor],
        seconds: Mapping[Shape, LinearSeconds],
    ) -> list[MatrixChoice | ChannelChoice]:
        matrices = [
            MatrixChoice(name, shape, losses[name], multiple_of=self.multiple_of)
            for name, shape in budgeted.shapes.items()
        ]
        mlps = [
            ChannelChoice(name, mlp.channel_size, losses[name], multiple_of=self.multiple_of)
            for name, mlp in budgeted.mlps.items()
        ]
        if self.unit == "parameters":
            return [*matrices, *mlps]
        scale = budgeted.size / budgeted.dense_seconds(seconds)
        return [
            *(_timed(matrix, seconds[matrix.shape], scale) for matrix in matrices),
            *(
                replace(mlp, channel_size=scale * budgeted.channel_seconds(mlp.name, seconds))
                for mlp in mlps
            ),
        ]

    def _budget(self, budgeted: Budgeted, least: float) -> int:
        dense = budgeted.size
        if self.removed_ratio is None:
            kept, key = round((self.keep_ratio or 0.0) * dense), f"keep_ratio {self.keep_ratio}"
            low, high = least / dense, 1.0
        else:
            kept = dense - round(self.removed_ratio * self.num_parameters)
            key, low = f"removed_ratio {self.removed_ratio}", 0.0
            high = (dense - least) / self.num_parameters
        if not least <= kept <= dense:
            raise ConfigError(
                f"method.{key} is out of reach: the feasible range of these linears is {low:.4f} "
                f"to {high:.4f}"
            )
        return kept


def _timed(matrix: MatrixChoice, seconds: LinearSeconds, scale: float) -> MatrixChoice:
    return replace(
        matrix,
        rank_size=scale * seconds.per_rank,
        fixed_size=scale * seconds.fixed,
        dense_size=scale * seconds.dense,
    )


def budgeted_linears(shapes: Shapes, mlps: Mapping[str, Narrowable]) -> Budgeted:
    """Return what shares a budget, with every linear in one place.

    Args:
        shapes: ``(N, M)`` of every linear, by module.
        mlps: MLPs that may lose channels, by reader.

    Returns:
        The MLPs, and the linears that are in none of them.
    """
    inside = {name for mlp in mlps.values() for name in (mlp.reader, *mlp.writers)}
    return Budgeted(shapes={n: s for n, s in shapes.items() if n not in inside}, mlps=mlps)
