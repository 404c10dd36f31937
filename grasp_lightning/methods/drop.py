"""Deletion of layers or blocks: the baseline that every replacement must beat."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop_blocks import DropBlocks, resolve_num_blocks
from grasp_lightning.methods.layer_choice import LayerChoice, configured_layers
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.options import refuse_ignored, resolve_deletion
from grasp_lightning.methods.prediction import Layers, Outlook, outlook_of
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import DropLayers, OptionValue, Plan
from grasp_lightning.stats.base import Statistics, Step

DROP = "drop"


class DropMethod(LayerwiseMethod):
    """Delete the chosen decoder layers.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, with GRASP's choice of layers.

    Args:
        layers: How layers are chosen.
        name: Method name in the plan and the model card.
        reference: Its publication.
        more_options: More options for the plan.
    """

    deletes_layers = True

    def __init__(
        self,
        layers: LayerChoice,
        name: str = DROP,
        reference: str = "https://arxiv.org/abs/2403.03853",
        more_options: Mapping[str, OptionValue] | None = None,
    ) -> None:
        super().__init__(name, reference, layers)
        self._more_options = more_options or {}

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        return {**self._layers.options, **self._more_options}

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        del model
        return None if plan.dropped_layers else Step(name=DROP, layers=layers)

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        del model, stats
        return Decision(operations=(DropLayers(layers=step.layers),))

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        if len(layers) == view.num_layers:
            raise ModelError(
                f"all {view.num_layers} decoder layers would be deleted; leave at least one"
            )
        return outlook_of(view, (DropLayers(layers=layers),))


def _resolved(config: MethodConfig) -> MethodConfig:
    unit = config.unit or "layers"
    if unit == "layers":
        return replace(resolve_deletion(config), unit=unit)
    reason = f"method.unit {unit} is chosen by the change of the predictions"
    refuse_ignored(config, ("layer_metric",), reason)
    return replace(resolve_deletion(config), unit=unit, layer_metric=None)


def _built(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    del track
    unit = config.unit or "layers"
    if unit != "layers":
        return DropBlocks(unit, configured_layers(resolve_num_blocks(config, unit, view)))
    return DropMethod(configured_layers(resolve_num_layers(config, view)))


DROP_METHOD: Final = Registered(
    name="drop",
    ignores="deletes layers and scores no components",
    resolve=_resolved,
    build=_built,
)
