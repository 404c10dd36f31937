"""Rank rules of low-rank methods: how many components each weight keeps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.ranks import (
    factor_parameters,
    largest_useful_rank,
    rank_for_keep_ratio,
    ranks_for_budget,
    stays_dense,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import OptionValue

Shapes = Mapping[str, tuple[int, int]]
"""Output and input features ``(N, M)`` of every weight that may be cut, by module."""

_TOLERANCE = 1e-3  # of a removed ratio, as a share of the model


class RankRule(ABC):
    """Gives every weight its rank; a weight that is missing in the result stays dense."""

    @property
    @abstractmethod
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the ranks depend on, for the plan."""

    @abstractmethod
    def ranks(self, shapes: Shapes) -> dict[str, int]:
        """Return the rank of every weight that gets smaller, in the order of ``shapes``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformRanks(RankRule):
    """Every weight keeps the same share of its parameters, in (0, 1): the paper's rule."""

    keep_ratio: float

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The keep ratio."""
        return {"keep_ratio": self.keep_ratio}

    def ranks(self, shapes: Shapes) -> dict[str, int]:
        """Return the largest rank within the ratio, at least 1, for weights that get smaller."""
        ranks = {name: rank_for_keep_ratio(self.keep_ratio, *shapes[name]) for name in shapes}
        return {name: rank for name, rank in ranks.items() if not stays_dense(rank, *shapes[name])}


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRanks(RankRule):
    """One keep ratio for all weights, solved for a number of parameters to remove.

    Parameters left over by rounding are spent on ranks until less than one rank unit is missing.

    Attributes:
        removed_ratio: Share of the whole model to remove.
        num_parameters: Parameters of the whole dense model.
    """

    removed_ratio: float
    num_parameters: int

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The removed share of the model."""
        return {"removed_ratio": self.removed_ratio}

    def ranks(self, shapes: Shapes) -> dict[str, int]:
        """Return ranks that spend the budget and no more; weights that cannot shrink stay dense."""
        shapes = {name: shape for name, shape in shapes.items() if not stays_dense(1, *shape)}
        dense = sum(rows * columns for rows, columns in shapes.values())
        kept = dense - round(self.removed_ratio * self.num_parameters)
        self._check_budget(tuple(shapes.values()), dense, kept)
        return dict(zip(shapes, ranks_for_budget(tuple(shapes.values()), kept), strict=True))

    def _check_budget(self, shapes: Sequence[tuple[int, int]], dense: int, kept: int) -> None:
        least = sum(factor_parameters(1, *shape) for shape in shapes)
        most = sum(factor_parameters(largest_useful_rank(*shape), *shape) for shape in shapes)
        unit = max((sum(shape) for shape in shapes), default=0)
        if least <= kept <= most + max(_TOLERANCE * self.num_parameters, unit):
            return
        # Rounded inwards, so that both ends can be requested.
        smallest, largest = ((dense - size) / self.num_parameters for size in (most, least))
        advice = "; choose more layers" if kept < least else ""
        raise ConfigError(
            f"method.removed_ratio {self.removed_ratio} is out of reach: the feasible range of the "
            f"chosen layers is {math.ceil(smallest * 1e4) / 1e4:.4f} to "
            f"{math.floor(largest * 1e4) / 1e4:.4f}{advice}"
        )


def configured_rule(config: MethodConfig, view: DecoderView) -> RankRule:
    """Return the rule that applies one ratio to every weight, either set or solved for."""
    if config.removed_ratio is not None:
        size = count_parameters(view.model)
        return BudgetRanks(removed_ratio=config.removed_ratio, num_parameters=size)
    assert config.keep_ratio is not None  # resolve_method has filled in one of both
    return UniformRanks(keep_ratio=config.keep_ratio)
