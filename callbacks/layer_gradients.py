"""Scores whole decoder layers by the gradients of all their parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning.callbacks.calibration_checkpoint import GroupStore
from grasp_lightning.callbacks.gradient_scores import GradientScores, in_groups
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.layer_gradients import LayerGradients
from grasp_lightning.training.calibration import CalibrationModule

_SCORES = "layer_scores"


class LayerTaylorScores(GradientScores[LayerGradients]):
    """Scores the layers of a step by ``|w dL/dw|``, summed over the parameters of each.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834.
    """

    def gradients(self, module: CalibrationModule, step: Step) -> LayerGradients:
        """Return empty sums for all modules with parameters in the layers."""
        return LayerGradients(module.view, step.needs.layer_gradients)

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

    def measured(layers: tuple[int, ...], number: int) -> Mapping[str, Tensor]:
        narrowed = replace(step, needs=replace(step.needs, layer_gradients=layers))
        scores = measure(narrowed, f"-layers-{number}").layer_scores
        return {_SCORES: torch.tensor([scores[i] for i in layers], dtype=torch.float64)}

    found: dict[int, float] = {}
    for layers, kept in in_groups(groups, measured, store):
        found |= dict(zip(layers, kept[_SCORES].tolist(), strict=True))
    return found
