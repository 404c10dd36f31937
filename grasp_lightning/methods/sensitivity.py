"""Ranks by the measured loss of a model in which a single linear is truncated."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from torch import Tensor, tensor

from grasp_lightning.config import MetricOptions
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.ranks import (
    factor_parameters,
    rank_for_keep_ratio,
    ranks_by_sensitivity,
    ranks_for_budget,
    stays_dense,
)
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.methods.prediction import Layers, Outlook, Prediction
from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.methods.truncation import Measured, MetricMethod, truncated
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import FactorizeLinear, OptionValue, Plan
from grasp_lightning.stats.base import Sensitivity, Statistics, Step

SENSITIVITY: Final = "sensitivity"
"""Name of the step that measures truncations."""
KEEP_RATIOS: Final[tuple[float, ...]] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_RANKS, _LOSSES, _COUNTS = "{name}.tried_ranks", "{name}.tried_losses", "sensitivity.counts"
_SECONDS_PER_MINUTE = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityRanks:
    """Ranks under one budget for all weights, by measured losses.

    Each weight is truncated alone, to the rank of each of ``KEEP_RATIOS``. ``ranks_by_sensitivity``
    chooses among the truncations that were measured: none is accepted on a guess.

    Attributes:
        removed_ratio: Share of the whole model to remove; None if ``keep_ratio`` is set.
        keep_ratio: Share to keep of the linears of the chosen layers.
        num_parameters: Parameters of the whole dense model.
        search_minutes: Time limit of the measurement; None: no limit.
    """

    removed_ratio: float | None = None
    keep_ratio: float | None = None
    num_parameters: int
    search_minutes: float | None = None

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        key = "keep_ratio" if self.removed_ratio is None else "removed_ratio"
        options: dict[str, OptionValue] = {key: getattr(self, key), "ranks": SENSITIVITY}
        if self.search_minutes is not None:
            options["search_minutes"] = self.search_minutes
        return options

    @property
    def seconds(self) -> float | None:
        """The time limit in seconds."""
        return None if self.search_minutes is None else self.search_minutes * _SECONDS_PER_MINUTE

    def kept(self, shapes: Shapes) -> int:
        """Return how many parameters of the weights stay; one out of reach is a ``ConfigError``."""
        dense = sum(m * n for m, n in shapes.values())
        least = _size_at(KEEP_RATIOS[-1], shapes)
        if self.removed_ratio is None:
            key, kept = f"keep_ratio {self.keep_ratio}", round((self.keep_ratio or 0.0) * dense)
            feasible = f"{math.ceil(least / dense * 1e4) / 1e4:.4f} to below 1"
        else:
            key = f"removed_ratio {self.removed_ratio}"
            kept = dense - round(self.removed_ratio * self.num_parameters)
            most = (dense - least) / self.num_parameters
            feasible = f"above 0 to {math.floor(most * 1e4) / 1e4:.4f}"
        if kept < least:
            raise ConfigError(
                f"method.{key} is out of reach: the feasible range of the chosen layers is "
                f"{feasible}, since method.ranks sensitivity keeps about {KEEP_RATIOS[-1]} of each "
                "matrix; use another ratio or choose more layers"
            )
        if kept == dense:
            raise ConfigError(
                f"method.{key} removes less than one parameter: nothing would be removed"
            )
        return kept

    def trials(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return the ranks to try of each weight that can get smaller, descending.

        With a time limit, those of the largest ratio that meets the budget come first.
        """
        kept, ratios = self.kept(shapes), [*KEEP_RATIOS]
        if self.search_minutes is not None:
            first = next(ratio for ratio in KEEP_RATIOS if _size_at(ratio, shapes) <= kept)
            ratios.insert(0, first)
        return {
            name: tuple(dict.fromkeys(rank_for_keep_ratio(ratio, *shape) for ratio in ratios))
            for name, shape in shapes.items()
            if not stays_dense(1, *shape)
        }

    def ranks(self, shapes: Shapes, losses: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
        """Return the rank of every weight that gets smaller, in the order of ``shapes``.

        Args:
            shapes: ``(N, M)`` of every weight.
            losses: Measured loss by weight and rank.

        Raises:
            ConfigError: If what was measured does not suffice for the budget.
        """
        ranks = ranks_by_sensitivity(shapes, losses, self.kept(shapes))
        if ranks is None:
            number = sum(map(len, losses.values()))
            raise ConfigError(
                f"the {number} truncations that were measured remove too little for this budget; "
                "measure without from_scores, or with a higher method.search_minutes"
            )
        return ranks


class SensitivityTruncation(MetricMethod[SensitivityRanks]):
    """Truncates weights to the ranks that a search by measured losses finds.

    For each linear and each keep ratio of 0.1, 0.2, ... 0.9, the model with only that linear
    truncated is run on a few calibration windows. Truncations are taken in the order of their
    losses, and so of their perplexities, until the budget is met. A linear takes the lowest of its
    ratios.

    Source: Yuan et al., "ASVD", arXiv:2312.05821, "Sensitivity-based Truncation Rank Searching".
    Its code counts nominal ratios and includes the head; here the parameters of the factors and of
    the whole model count, and only decoder layers are truncated.
    """

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        if plan.ranks:
            return None
        trials = self._rule.trials(weight_shapes(model, plan, layers))
        measured = self._curvature_step(model, trials)
        search = Sensitivity(
            ranks={name: trials[name] for name in measured.needs.moments},
            metric=MetricOptions(**asdict(self._metric)),
            seconds=self._rule.seconds,
        )
        return replace(
            measured, name=SENSITIVITY, needs=replace(measured.needs, sensitivity=search)
        )

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        assert step.needs.sensitivity is not None  # _step has set it
        trials = step.needs.sensitivity.ranks
        layers = {model.layer_of(module) for module in trials}
        chosen = tuple(index for index in model.layer_indices if index in layers)
        # As they are stored, so that a run from stored losses decides the same.
        scores = stored_trials(stats.truncation_losses, sum(map(len, trials.values())))
        losses = {name: read_trials(name, scores) for name in stats.truncation_losses}
        ranks = self._rule.ranks(weight_shapes(model, Plan(method="search"), chosen), losses)
        measured = Measured(model, self._metric, stats.moments, self._track)
        cut = truncated(measured, ranks)
        return replace(cut, scores={**cut.scores, **scores}, refit=self._refit)

    def predict(self, view: DecoderView) -> Prediction:
        """Return the size that the budget allows; the data decides on ranks."""
        return replace(super().predict(view), ranks={}, is_budget=True)

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        """Return a uniform keep ratio, which takes about as much memory."""
        shapes = weight_shapes(view, Plan(method="prediction"), layers)
        kept = self._rule.kept(shapes)
        dense = sum(m * n for m, n in shapes.values())
        cut = {name: shape for name, shape in shapes.items() if not stays_dense(1, *shape)}
        left = kept - sum(m * n for name, (m, n) in shapes.items() if name not in cut)
        ranks = ranks_for_budget(tuple(cut.values()), left)
        operations = tuple(
            FactorizeLinear(module=name, rank=rank, components=None)
            for name, rank in zip(cut, ranks, strict=True)
        )
        return Outlook(operations, count_parameters(view.model) - dense + kept, left)


def stored_trials(
    losses: Mapping[str, Mapping[int, float]], num_candidates: int
) -> dict[str, Tensor]:
    """Return measured losses by their storage names.

    Args:
        losses: Loss by linear and rank.
        num_candidates: How many there would be without a time limit.

    Returns:
        ``<module>.tried_ranks`` and ``<module>.tried_losses``, one entry per measurement, and
        ``sensitivity.counts``: the number of measurements, and that of candidates; all float32.
    """
    number = sum(map(len, losses.values()))
    found = {_COUNTS: tensor([float(number), float(num_candidates)])}
    for name, by_rank in losses.items():
        found[_RANKS.format(name=name)] = tensor([float(rank) for rank in by_rank])
        found[_LOSSES.format(name=name)] = tensor(list(by_rank.values()))
    return found


def read_trials(name: str, scores: Mapping[str, Tensor]) -> dict[int, float]:
    """Return the stored losses of a linear by rank; empty if it has none."""
    ranks, losses = (scores.get(key.format(name=name)) for key in (_RANKS, _LOSSES))
    if ranks is None or losses is None:
        return {}
    return dict(zip(map(int, ranks.tolist()), losses.tolist(), strict=True))


def trial_counts(scores: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return how many truncations were measured, and of how many; None without a search."""
    counts = scores.get(_COUNTS)
    if counts is None:
        return None
    measured, candidates = map(int, counts.tolist())
    return measured, candidates


def _size_at(keep_ratio: float, shapes: Shapes) -> int:
    """Return the parameters of all weights at one ratio; those that cannot shrink stay dense."""
    ranks = {name: rank_for_keep_ratio(keep_ratio, *shape) for name, shape in shapes.items()}
    return sum(
        m * n if stays_dense(ranks[name], m, n) else factor_parameters(ranks[name], m, n)
        for name, (m, n) in shapes.items()
    )
