"""Truncation to ranks that differ between the layers, within each type of linear (SVD-LLM V2)."""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Final

from grasp_lightning.linalg.ranks import factor_parameters, ranks_for_budget, removal_weights
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.methods.truncation import Measured, Truncation, component_losses
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import OptionValue

NUM_TOKENS: Final = 256 * 2048
"""Tokens over which the publication sums squared errors.

The logarithm in its formula depends on their number. With a constant one, the amount of
calibration text does not change how unequal the ranks are.
"""


class PerTypeTruncation(Truncation):
    """Truncates to as many parameters as one keep ratio for all, with ranks that differ by layer.

    Linears of one type are those with one name inside their layers. Each is first truncated at the
    common ratio, which gives the smallest possible error of its outputs. From these errors follows
    how much each linear of a type loses (``removal_weights``), with the same mean for all types.

    Source: Wang et al., "SVD-LLM V2", arXiv:2503.12340. Its truncation by two decompositions gives
    the same factors as the Cholesky root of the Gram matrix here. It leaves open how ranks are
    rounded and what happens at rank 1: here one factor scales all removals until the budget is met.
    """

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        return {**super().options, "ranks": "per_type"}

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes, and ranks of one common keep ratio."""
        return replace(super().predict(view), is_per_type=True)

    def _ranks(self, ranks: Mapping[str, int], measured: Measured) -> Mapping[str, int]:
        found = component_losses(measured, ranks)
        dropped = {name: float(found[name][rank:].sum()) for name, rank in ranks.items()}
        removal: dict[str, float] = {}
        for names in _types(measured.view, ranks).values():
            losses = [sqrt(NUM_TOKENS * dropped[name]) for name in names]
            removal |= zip(names, removal_weights(losses), strict=True)
        linears = measured.view.all_linears()
        shapes = [(linears[name].out_features, linears[name].in_features) for name in ranks]
        kept = sum(factor_parameters(k, *s) for k, s in zip(ranks.values(), shapes, strict=True))
        spent = ranks_for_budget(shapes, kept, [removal[name] for name in ranks])
        return dict(zip(ranks, spent, strict=True))


def _types(view: DecoderView, modules: Mapping[str, int]) -> dict[str, list[str]]:
    """Group linears by their name inside their layers."""
    found: dict[str, list[str]] = {}
    for name in modules:
        kind = name.removeprefix(f"{view.layers_name}.{view.layer_of(name)}.")
        found.setdefault(kind, []).append(name)
    return found
