"""Methods that choose decoder layers first, and then work on them."""

from abc import abstractmethod

from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice
from grasp_lightning.methods.prediction import Layers, Outlook, Prediction, predict_layers
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics, Step


class LayerwiseMethod(CompressionMethod):
    """Chooses layers in its first step; what follows, a subclass says.

    Args:
        name: Name under which the plan and the model card know the method.
        reference: Publication that it follows.
        layers: How layers are chosen.

    Attributes:
        deletes_layers: The chosen layers are deleted, so that only those may be chosen without
            which the model is still whole.
    """

    deletes_layers = False

    def __init__(self, name: str, reference: str, layers: LayerChoice) -> None:
        self.name = name
        self.reference = reference
        self._layers = layers

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the choice of layers, then what is done to them.

        Args:
            model: The model with all operations of the plan applied.
            plan: Decisions so far.

        Returns:
            The next step, or None if nothing is left to do.
        """
        layers = plan.selected_layers
        return self._layers.step(model) if layers is None else self._step(model, plan, layers)

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the chosen layers, or what is done to them.

        Args:
            step: What ``next_step`` asked for.
            model: The model, as it was measured.
            stats: What was measured.

        Returns:
            The decision of this step.
        """
        if step.name == SELECT:
            return self._layers.decide(stats, model if self.deletes_layers else None)
        return self._decide(step, model, stats)

    def predict(self, view: DecoderView) -> Prediction:
        """Return what would be removed, of the smallest and of the largest layers.

        Args:
            view: The dense model; its weights may be on the meta device.

        Returns:
            Sizes before and after. More layers than there are, are a ``ConfigError``.
        """
        self._layers.check(view.num_layers)
        candidates = self._layers.layers or view.layer_indices
        prediction = predict_layers(
            view, candidates, self._layers.count, lambda layers: self._outlook(view, layers)
        )
        if self.deletes_layers:
            self._layers.check_drop(view)
        return prediction

    @abstractmethod
    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        """Return the next step on the chosen layers, or None if nothing is left to do."""

    @abstractmethod
    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return what is done to the chosen layers."""

    @abstractmethod
    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        """Return what would be done to some layers, from shapes alone."""
