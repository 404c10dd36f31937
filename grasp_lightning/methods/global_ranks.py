"""One budget for all matrices and MLPs, spent where it hurts least."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from grasp_lightning.config import MlpChoice
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.allocation import Allocation, ChannelChoice, MatrixChoice, allocate
from grasp_lightning.linalg.ranks import largest_useful_rank
from grasp_lightning.methods.narrowing import Narrowable
from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.plan import OptionValue


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
    """

    removed_ratio: float | None = None
    keep_ratio: float | None = None
    num_parameters: int
    multiple_of: int = 1
    mlp: MlpChoice = "factors"

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the decisions depend on, for the plan."""
        key = "keep_ratio" if self.removed_ratio is None else "removed_ratio"
        options: dict[str, OptionValue] = {
            key: getattr(self, key),
            "ranks": "global",
            "mlp": self.mlp,
        }
        return options if self.multiple_of == 1 else {**options, "multiple_of": self.multiple_of}

    def allocation(self, budgeted: Budgeted, losses: Mapping[str, Tensor]) -> Allocation:
        """Return the rank of every matrix, and the channels of every MLP, that gets smaller.

        Args:
            budgeted: What shares the budget.
            losses: Predicted loss of dropping each component of a matrix, ``(K,)`` by module, and
                of each channel of an MLP, ``(I,)`` by reader; descending.

        Returns:
            Ranks by module, and channels by reader.
        """
        matrices = [
            MatrixChoice(
                name=name,
                shape=shape,
                squared_singular_values=losses[name],
                min_rank=min(self.multiple_of, max(1, largest_useful_rank(*shape))),
                multiple_of=self.multiple_of,
            )
            for name, shape in budgeted.shapes.items()
        ]
        mlps = [
            ChannelChoice(
                name=name,
                channel_size=mlp.channel_size,
                losses=losses[name],
                multiple_of=self.multiple_of,
            )
            for name, mlp in budgeted.mlps.items()
        ]
        return allocate([*matrices, *mlps], self.budget(budgeted))

    def budget(self, budgeted: Budgeted) -> int:
        """Return how many parameters the matrices and MLPs may keep.

        Args:
            budgeted: What shares the budget.

        Returns:
            Number of parameters.

        Raises:
            ConfigError: If the budget is out of reach, naming the feasible range.
        """
        dense = budgeted.size
        least = sum(min(self._least(*s), s[0] * s[1]) for s in budgeted.shapes.values())
        least += sum(
            min(self.multiple_of, mlp.num_channels) * mlp.channel_size
            for mlp in budgeted.mlps.values()
        )
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

    def _least(self, rows: int, columns: int) -> int:
        top = largest_useful_rank(rows, columns)
        if top < self.multiple_of:
            return rows * columns
        return self.multiple_of * (rows + columns)


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
