"""SLEB: delete one layer after the other, each time the one that the loss needs least."""

from collections.abc import Mapping
from typing import Final

from grasp_lightning.config import AmountOptions, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.options import resolve_number
from grasp_lightning.methods.prediction import Prediction, outlook_of, predict_layers
from grasp_lightning.methods.removal import REMOVALS, layer_part, stored_losses
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import singly_droppable_layers
from grasp_lightning.plan import DropLayers, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Statistics, Step

SLEB: Final = "sleb"


class Sleb(CompressionMethod):
    """Delete layers one by one, each where the loss without it is lowest.

    Step i measures, for each candidate j of the layers that are left, the mean cross-entropy
    ``L(M_i without j)`` of the calibration text, where ``M_i`` is the model without the layers
    deleted so far. The layer with the lowest loss is deleted. The first and the last of the layers
    left are no candidates, nor are layers that the model needs. Ties go to the lower number.

    Source: Song et al., "SLEB", arXiv:2402.09025, Algorithm 1. Its public code protects the first
    and the last layer.

    Args:
        num_layers: Number of layers to delete.
    """

    name = SLEB
    reference = "https://arxiv.org/abs/2402.09025"
    skips_parts = True

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The number of layers."""
        return {"num_layers": self._num_layers}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Request the loss without each candidate, until enough layers are deleted.

        Raises:
            ModelError: If no layer is left that can be deleted.
        """
        if len(plan.dropped_layers) == self._num_layers:
            return None
        candidates = _candidates(model)
        if not candidates:
            raise ModelError(
                f"after {len(plan.dropped_layers)} of {self._num_layers} layers, no other can be "
                "deleted; lower method.num_layers or method.removed_ratio"
            )
        parts = tuple(layer_part(model, index) for index in candidates)
        return Step(name=REMOVALS, needs=Needs(removables=parts, removal_measure="loss"))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Delete the candidate without which the loss is lowest, and store all losses."""
        losses, gone = stats.removal_losses, model.num_layers - len(model.layer_indices)
        best = min(step.needs.removables, key=lambda part: losses[part.name])
        found = {part.layer: losses[part.name] for part in step.needs.removables}
        return Decision(
            operations=(DropLayers(layers=(best.layer,)),),
            scores=stored_losses(gone, found),
        )

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes for the smallest and for the largest candidates.

        Raises:
            ConfigError: If more layers are to be deleted than there are candidates.
        """
        candidates = _candidates(view)
        if self._num_layers > len(candidates):
            raise ConfigError(
                f"method sleb should delete {self._num_layers} layers, but it can delete "
                f"{len(candidates)} of {view.num_layers}: the first, the last, and layers that the "
                "model needs must stay; lower method.num_layers or method.removed_ratio"
            )
        return predict_layers(
            view,
            candidates,
            self._num_layers,
            lambda layers: outlook_of(view, (DropLayers(layers=layers),)),
        )


def _candidates(model: DecoderView) -> tuple[int, ...]:
    return singly_droppable_layers(model, model.layer_indices[1:-1])


def _built(config: MethodConfig, view: DecoderView, track: Track) -> Sleb:
    del track
    view.check_droppable()
    return Sleb(resolve_num_layers(config, view).num_layers or 0)


SLEB_METHOD: Final = Registered(
    name=SLEB,
    options=AmountOptions,
    ignores="searches the layers by the loss",
    resolve=resolve_number,
    build=_built,
)
