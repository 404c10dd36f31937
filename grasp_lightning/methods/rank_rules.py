"""How many components each weight keeps: the rank rule of low-rank methods."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.ranks import (
    factor_parameters,
    rank_for_keep_ratio,
    ranks_for_budget,
    stays_dense,
)
from grasp_lightning.plan import OptionValue

Shapes = Mapping[str, tuple[int, int]]
"""Output and input features ``(N, M)`` of every weight that may be cut, by module."""


class RankRule(ABC):
    """Gives every weight its rank; a weight that is missing in the result stays dense."""

    @property
    @abstractmethod
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the ranks depend on, for the plan."""

    @abstractmethod
    def ranks(self, shapes: Shapes) -> dict[str, int]:
        """Return the rank of every weight that gets smaller.

        Args:
            shapes: All weights of all chosen layers.

        Returns:
            Rank by module, in the order of ``shapes``.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformRanks(RankRule):
    """Every weight keeps the same share of its parameters: the paper's rule.

    Attributes:
        keep_ratio: The share, in (0, 1).
    """

    keep_ratio: float

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The keep ratio."""
        return {"keep_ratio": self.keep_ratio}

    def ranks(self, shapes: Shapes) -> dict[str, int]:
        """Return the largest rank of every weight within the ratio, at least 1.

        Args:
            shapes: The weights.

        Returns:
            Rank by module; dense where factors would not be smaller.
        """
        ranks = {name: rank_for_keep_ratio(self.keep_ratio, *shapes[name]) for name in shapes}
        return {name: rank for name, rank in ranks.items() if not stays_dense(rank, *shapes[name])}


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRanks(RankRule):
    """One keep ratio for all weights, solved so that a number of parameters goes.

    What rounding leaves over goes back as rank, so that less than one rank unit is missing.

    Attributes:
        removed_ratio: Share of all the model's parameters that goes.
        num_parameters: Parameters of the whole dense model.
    """

    removed_ratio: float
    num_parameters: int

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The share of the model that goes."""
        return {"removed_ratio": self.removed_ratio}

    def ranks(self, shapes: Shapes) -> dict[str, int]:
        """Return ranks that spend what may stay of the weights, and not more.

        Args:
            shapes: All weights of all chosen layers.

        Returns:
            Rank by module.

        Raises:
            ConfigError: If even rank 1 leaves too much, naming the feasible range.
        """
        dense = sum(rows * columns for rows, columns in shapes.values())
        smallest = sum(factor_parameters(1, *shape) for shape in shapes.values())
        kept = dense - round(self.removed_ratio * self.num_parameters)
        if kept < smallest:
            most = (dense - smallest) / self.num_parameters
            raise ConfigError(
                f"method.removed_ratio {self.removed_ratio} is out of reach: the chosen layers can "
                f"give between 0 and {most:.4f} of the model; choose more layers"
            )
        return dict(zip(shapes, ranks_for_budget(tuple(shapes.values()), kept), strict=True))
