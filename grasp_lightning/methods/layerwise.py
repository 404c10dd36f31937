"""Methods that first choose decoder layers and then work on them."""

from abc import abstractmethod

from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.prediction import Layers, Outlook, Prediction, predict_layers
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics, Step


class LayerwiseMethod(CompressionMethod):
    """Chooses layers in its first step; subclasses define the following steps.

    Args:
        name: Method name in the plan and the model card.
        reference: Its publication.
        layers: How layers are chosen.

    Attributes:
        deletes_layers: The chosen layers are deleted, so only layers that the model works without
            may be chosen.
    """

    deletes_layers = False

    def __init__(self, name: str, reference: str, layers: LayerChoice) -> None:
        self.name = name
        self.reference = reference
        self._layers = layers

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the choice of layers, then the steps of the subclass."""
        layers = plan.selected_layers
        return self._layers.step(model) if layers is None else self._step(model, plan, layers)

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the chosen layers, or the decision of the subclass."""
        if step.name == self._layers.step_name:
            return self._layers.decide(stats, model if self.deletes_layers else None)
        return self._decide(step, model, stats)

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes for the smallest and for the largest layers.

        More layers than the model has are a ``ConfigError``.
        """
        self._layers.check(view.num_layers)
        prediction = predict_layers(
            view,
            self._layers.candidates(view),
            self._layers.count,
            lambda layers: self._outlook(view, layers),
            is_contiguous=self._layers.is_contiguous,
        )
        if self.deletes_layers:
            self._layers.check_drop(view)
        return prediction

    @abstractmethod
    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        """Return the next step on the chosen layers, or None when the plan is complete."""

    @abstractmethod
    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the operations on the chosen layers."""

    @abstractmethod
    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        """Return what would be done to some layers, from shapes alone."""
