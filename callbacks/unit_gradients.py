"""Scores MLP channels and key/value groups by the gradients of their weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning.callbacks.calibration_checkpoint import GroupStore
from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.models.units import Units
from grasp_lightning.progress import expect_passes, skip_pass
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.unit_gradients import UnitGradients
from grasp_lightning.training.calibration import Batch, CalibrationModule

_NUM_TARGETS = "num_targets"


class UnitTaylorScores(Measurement):
    """Scores the units of a step, see ``stats.unit_gradients``."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given: Step | None = step
        self._gradients: UnitGradients  # set while hooks are attached
        self._num_targets = 0

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the given step."""
        del module
        return self._given

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on the linears."""
        needs = step.needs
        self._gradients = UnitGradients(module.view, needs.units, needs.importance)
        self._num_targets = 0
        return self._gradients.observer.attached()

    def start_batch(self, batch: Batch) -> None:
        """Count the predicted tokens."""
        self._gradients.start_batch(batch["targets"])
        self._num_targets += int(batch["targets"][:, 1:].sum())

    def check_seen(self) -> None:
        """Refuse a linear that the model does not call."""
        self._gradients.check_seen()

    def release(self) -> None:
        """Release the sums."""
        del self._gradients
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums, and the number of predicted tokens."""
        return {**self._gradients.state(), _NUM_TARGETS: torch.tensor(self._num_targets)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._gradients.load_state(sums)
        self._num_targets = int(sums[_NUM_TARGETS])

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
    expect_passes(len(groups))
    found: dict[str, Tensor] = {}
    for number, units in enumerate(groups):
        kept = None if store is None else store.load(number)
        if kept is None:
            narrowed = replace(step, needs=replace(step.needs, units=units))
            kept = measure(narrowed, f"-units-{number}").unit_scores
            if store is not None:
                store.save(number, kept)
        else:
            skip_pass()
        found |= kept
    return found
