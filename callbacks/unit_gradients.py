"""Scores MLP channels and key/value groups by the gradients of their weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from grasp_lightning.callbacks.calibration_checkpoint import GroupStore
from grasp_lightning.callbacks.gradient_scores import GradientScores, in_groups
from grasp_lightning.models.units import Units
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.unit_gradients import UnitGradients
from grasp_lightning.training.calibration import Batch, CalibrationModule


class UnitTaylorScores(GradientScores[UnitGradients]):
    """Scores the units of a step, see ``stats.unit_gradients``."""

    def gradients(self, module: CalibrationModule, step: Step) -> UnitGradients:
        """Return empty sums for the linears of the units."""
        needs = step.needs
        return UnitGradients(module.view, needs.units, needs.importance, needs.grouping)

    def start_batch(self, batch: Batch) -> None:
        """Announce the predicted tokens, and count them."""
        self._gradients.start_batch(batch["targets"])
        super().start_batch(batch)

    def statistics(self) -> Statistics:
        """Return the score of every unit."""
        return Statistics(unit_scores=self._gradients.scores(self._num_targets))


def unit_scores(
    step: Step,
    groups: Sequence[tuple[Units, ...]],
    measure: Callable[[Step, str], Statistics],
    store: GroupStore | None,
) -> dict[str, Tensor]:
    """Return the scores of all units by the reader of their block, one group per pass.

    Args:
        step: The step that asks for them.
        groups: Its units, in groups whose summed gradients fit into memory.
        measure: Runs the pass of a narrowed step; its second argument tells passes apart.
        store: Keeps finished groups; None keeps none.
    """

    def measured(units: tuple[Units, ...], number: int) -> Mapping[str, Tensor]:
        narrowed = replace(step, needs=replace(step.needs, units=units))
        return measure(narrowed, f"-units-{number}").unit_scores

    found: dict[str, Tensor] = {}
    for _, kept in in_groups(groups, measured, store):
        found |= kept
    return found
