"""Deleting redundant layers: the control that every replacement must beat."""

from collections.abc import Mapping

from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import DropLayers, OptionValue, Plan
from grasp_lightning.stats.base import Statistics, Step

DROP = "drop"


def drop_step(layers: tuple[int, ...]) -> Step:
    """Return the step that deletes layers; it needs no measurement.

    Args:
        layers: Indices of the layers, as in the original model.

    Returns:
        The step, named ``drop``.
    """
    return Step(name=DROP, layers=layers)


def drop_decision(step: Step) -> Decision:
    """Return the deletion of a step's layers.

    Args:
        step: What ``drop_step`` returned.

    Returns:
        One ``DropLayers``.
    """
    return Decision(operations=(DropLayers(layers=step.layers),))


class DropMethod(CompressionMethod):
    """Delete the chosen decoder layers.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, with GRASP's choice of layers.

    Args:
        layers: How layers are chosen.
    """

    name = "drop"
    reference = "https://arxiv.org/abs/2403.03853"

    def __init__(self, layers: LayerChoice) -> None:
        self._layers = layers

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        return self._layers.options

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the choice of layers, then their deletion.

        Args:
            model: The model with all operations of the plan applied.
            plan: Decisions so far.

        Returns:
            The next step, or None after the layers were deleted.
        """
        if plan.selected_layers is None:
            return self._layers.step(model)
        return None if plan.dropped_layers else drop_step(plan.selected_layers)

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the chosen layers, or their deletion.

        Args:
            step: What ``next_step`` asked for.
            model: The model.
            stats: What was measured.

        Returns:
            The decision of this step.
        """
        return self._layers.decide(stats, model) if step.name == SELECT else drop_decision(step)
