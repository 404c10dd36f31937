"""One budget for all matrices, spent where it hurts least."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.allocation import MatrixChoice, allocate
from grasp_lightning.linalg.ranks import largest_useful_rank
from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.plan import OptionValue


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalRanks:
    """Ranks of the smallest predicted loss under one budget: some matrices stay dense.

    Losses of all matrices must have one unit, which ``kfac`` gives. With one Lagrange multiplier
    for all, each matrix takes the rank that minimises its loss plus the multiplier times its size.

    Attributes:
        removed_ratio: Share of all the model's parameters that goes; None if ``keep_ratio`` is set.
        keep_ratio: Share of the parameters of the chosen matrices that stays.
        num_parameters: Parameters of the whole dense model.
        multiple_of: Ranks are multiples of this number.
    """

    removed_ratio: float | None = None
    keep_ratio: float | None = None
    num_parameters: int
    multiple_of: int = 1

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the ranks depend on, for the plan."""
        key = "keep_ratio" if self.removed_ratio is None else "removed_ratio"
        options: dict[str, OptionValue] = {key: getattr(self, key), "ranks": "global"}
        return options if self.multiple_of == 1 else {**options, "multiple_of": self.multiple_of}

    def ranks(self, shapes: Shapes, losses: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the rank of every matrix that gets smaller.

        Args:
            shapes: ``(N, M)`` of every matrix that may be cut, by module.
            losses: Predicted loss of dropping each component, ``(K,)`` descending, by module.

        Returns:
            Rank by module, in the order of ``shapes``.
        """
        choices = [
            MatrixChoice(
                name=name,
                shape=shape,
                squared_singular_values=losses[name],
                min_rank=min(self.multiple_of, max(1, largest_useful_rank(*shape))),
                multiple_of=self.multiple_of,
            )
            for name, shape in shapes.items()
        ]
        found = allocate(choices, self.budget(shapes)).ranks
        return {name: found[name] for name in shapes if name in found}

    def budget(self, shapes: Shapes) -> int:
        """Return how many parameters the matrices may keep.

        Args:
            shapes: ``(N, M)`` of every matrix that may be cut, by module.

        Returns:
            Number of parameters.

        Raises:
            ConfigError: If the budget is out of reach, naming the feasible range.
        """
        dense = sum(rows * columns for rows, columns in shapes.values())
        least = sum(min(self._least(*shape), shape[0] * shape[1]) for shape in shapes.values())
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
