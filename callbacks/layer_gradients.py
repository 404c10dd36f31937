"""Scores whole decoder layers by the gradients of all their parameters."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning.callbacks.calibration_checkpoint import GroupStore
from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.progress import expect_passes, skip_pass
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.layer_gradients import LayerGradients
from grasp_lightning.training.calibration import Batch, CalibrationModule

_NUM_TARGETS = "num_targets"
_SCORES = "layer_scores"


class LayerTaylorScores(Measurement):
    """Scores the layers of a step by ``|w dL/dw|``, summed over the parameters of each.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834.
    """

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given: Step | None = step
        self._gradients: LayerGradients  # set while hooks are attached
        self._num_targets = 0

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the given step."""
        del module
        return self._given

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on all modules with parameters in the layers."""
        self._gradients = LayerGradients(module.view, step.needs.layer_gradients)
        self._num_targets = 0
        return self._gradients.observer.attached()

    def start_batch(self, batch: Batch) -> None:
        """Count the predicted tokens."""
        self._num_targets += int(batch["targets"][:, 1:].sum())

    def check_seen(self) -> None:
        """Refuse a module whose parameters are read without a call."""
        self._gradients.check_seen()

    def release(self) -> None:
        """Release the sums."""
        del self._gradients
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the summed gradients, and the number of predicted tokens."""
        return {**self._gradients.state(), _NUM_TARGETS: torch.tensor(self._num_targets)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._gradients.load_state(sums)
        self._num_targets = int(sums[_NUM_TARGETS])

    def statistics(self) -> Statistics:
        """Return the score of every layer."""
        return Statistics(layer_scores=self._gradients.scores(self._num_targets))


def layer_scores(
    step: Step,
    groups: Sequence[tuple[int, ...]],
    measure: Callable[[Step, str], Statistics],
    store: GroupStore | None,
) -> dict[int, float]:
    """Return the score of every layer, measured one group of layers per pass.

    Args:
        step: The step that asks for them.
        groups: Its layers, in groups whose summed gradients fit into memory.
        measure: Runs the pass of a narrowed step; its second argument tells passes apart.
        store: Keeps finished groups; None keeps none.
    """
    expect_passes(len(groups))
    found: dict[int, float] = {}
    for number, layers in enumerate(groups):
        kept = None if store is None else store.load(number)
        if kept is None:
            narrowed = replace(step, needs=replace(step.needs, layer_gradients=layers))
            scores = measure(narrowed, f"-layers-{number}").layer_scores
            kept = {_SCORES: torch.tensor([scores[i] for i in layers], dtype=torch.float64)}
            if store is not None:
                store.save(number, kept)
        else:
            skip_pass()
        found |= dict(zip(layers, kept[_SCORES].tolist(), strict=True))
    return found
