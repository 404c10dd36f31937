"""Scores singular components by |theta * dL/dtheta|, accumulated in the backward pass of a fit."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from grasp_lightning.callbacks.calibration_checkpoint import GroupStore
from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.config import Reduction, Score, Terms
from grasp_lightning.methods.attribution import attribution_step, stored_scores
from grasp_lightning.methods.base import Track, untracked
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.stats.base import Needs, Scoring, Statistics, Step
from grasp_lightning.stats.components import ComponentScores
from grasp_lightning.stats.observer import LinearObserver
from grasp_lightning.training.calibration import Batch, CalibrationModule

_NUM_TARGETS = "num_targets"


class SingularAttribution(Measurement):
    """Scores the singular components of the linears of redundant layers.

    The model runs dense: the gradients of U, s and V follow from the input and the output gradient
    of each linear. After ``LayerSimilarity`` it runs in the second epoch, on the chosen layers;
    with explicit ``layers`` it runs in the first.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6.

    Args:
        layers: Indices of decoder layers; None takes those that ``LayerSimilarity`` chooses.
        terms: Score all of u, s and v, or s alone.
        reduction: How per-window scores are combined.
        score: Score theta * dL/dtheta, or dL/dtheta alone.
        track: Shows the progress of the factorization.
        step: A method's step to measure instead.
    """

    def __init__(
        self,
        layers: tuple[int, ...] | None = None,
        terms: Terms = "full",
        reduction: Reduction = "absolute",
        score: Score = "taylor",
        *,
        track: Track = untracked,
        step: Step | None = None,
    ) -> None:
        super().__init__()
        self._layers = layers
        self._scoring = Scoring(terms=terms, reduction=reduction, score=score)
        self._track = track
        self._given = step
        self._scores: ComponentScores  # set while hooks are attached
        self._num_targets = 0

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the step that scores the layers, once they are known."""
        if self._given is not None:
            return self._given
        if self._layers is not None:
            module.layer_choice = LayerChoice(layers=self._layers)
            module.measured.append((module.layer_choice.step(module.view), Statistics()))
        layers = module.selected_layers
        if layers is None:
            return None
        modules = [name for index in layers for name in module.view.linears(index)]
        return attribution_step(module.view, modules, self._scoring, track=self._track)

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on the linears of the chosen layers."""
        self._scores = ComponentScores(step.bases, step.needs.scoring)
        self._num_targets = 0
        observer = LinearObserver(module.view, step.needs.weight_gradients, self._scores.add)
        return observer.attached()

    def start_batch(self, batch: Batch) -> None:
        """Count the predicted tokens."""
        self._num_targets += int(batch["targets"][:, 1:].sum())

    def check_seen(self) -> None:
        """Refuse a linear that the model does not call."""
        self._scores.check_seen()

    def release(self) -> None:
        """Release the bases."""
        del self._scores
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of every module, and the number of predicted tokens."""
        return {**self._scores.state(), _NUM_TARGETS: torch.tensor(self._num_targets)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._scores.load_state(sums)
        self._num_targets = int(sums[_NUM_TARGETS])

    def statistics(self) -> Statistics:
        """Return the score of every component."""
        return Statistics(component_scores=self._scores.mean(self._num_targets))


def group_scores(
    needs: Needs,
    step_of: Callable[[Sequence[str]], Step],
    measure: Callable[[Step, str], Statistics],
    store: GroupStore | None,
) -> dict[str, Tensor]:
    """Return scores and singular values, as stored, of layers other than the chosen ones.

    Args:
        step_of: Maps the modules of a group to the step that scores them.
        measure: Runs the pass of such a step; its second argument tells passes apart.
        store: Keeps finished groups; None keeps none.
    """
    found: dict[str, Tensor] = {}
    for number, modules in enumerate(needs.more_groups):
        kept = None if store is None else store.load(number)
        if kept is None:
            step = step_of(modules)
            scores: Mapping[str, Tensor] = {name: basis.s for name, basis in step.bases.items()}
            if step.needs.weight_gradients:
                scores = measure(step, f"-group-{number}").component_scores
            kept = stored_scores(step.bases, scores)
            if store is not None:
                store.save(number, kept)
        found |= kept
    return found
