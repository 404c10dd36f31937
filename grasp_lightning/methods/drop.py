"""Deletion of layers or blocks: the baseline that every replacement must beat."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop_blocks import DropBlocks, resolve_num_blocks
from grasp_lightning.methods.layer_choice import LayerChoice, configured_layers
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.options import refuse_ignored, resolve_deletion
from grasp_lightning.methods.prediction import Layers, Outlook, Prediction, outlook_of
from grasp_lightning.methods.seams import (
    SEAM,
    checked_ridge,
    runs_of,
    seam_operations,
    seam_size,
    seam_weight,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations import applier_of
from grasp_lightning.plan import DropLayers, Operation, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Seam, Statistics, Step

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


class SeamedDrop(DropMethod):
    """Delete the chosen decoder layers, and add one linear map per run of deleted layers.

    With the states X that enter a run and the states Z that leave it, the map adds ``X A^T`` to X,
    ``A^T = (X^T X + rho I)^-1 X^T (Z - X)``, summed in float64 over the real tokens. It acts on all
    hidden states, so no linear of the model can take it over: the layer that follows holds it as an
    additional ``C x C`` matrix, which counts as parameters.

    Source: "Ghosted Layers", arXiv:2605.15491, ``W* = I + M*``, with a relative ridge. LinearPatch
    (NeurIPS 2025) uses a Hadamard transform and one scale per channel instead.

    Args:
        layers: How layers are chosen.
        ridge: ``rho``, as a share of the mean diagonal of ``X^T X``.
    """

    def __init__(self, layers: LayerChoice, ridge: float) -> None:
        super().__init__(layers, more_options={"seam": "linear", "ridge": ridge})
        self._ridge = ridge

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        if plan.dropped_layers:
            return None
        seams = tuple(Seam(layers=run) for run in runs_of(layers, model.layer_indices))
        return Step(name=SEAM, layers=layers, needs=Needs(seams=seams))

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        tensors: dict[str, Tensor] = {}
        for seam in seam_operations(model, step.layers):
            (name,) = applier_of(seam).own_tensors(seam, model)
            weight = seam_weight(stats.seams[Seam(layers=seam.layers)], self._ridge)
            is_double = model.model.dtype == torch.float64
            tensors[name] = weight if is_double else weight.float()
        return Decision(operations=self._operations(model, step.layers), tensors=tensors)

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        super()._outlook(view, layers)  # refuses the deletion of all layers
        return outlook_of(view, self._operations(view, layers))

    def _operations(self, view: DecoderView, layers: Layers) -> tuple[Operation, ...]:
        return (DropLayers(layers=layers), *seam_operations(view, layers))

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes for one run of deleted layers, up to those for as many as there can be.

        More layers than the model has are a ``ConfigError``.
        """
        found = super().predict(view)
        choice = self._layers
        if choice.layers is not None or choice.metric == "angular":
            return found
        most_runs = min(choice.count, view.num_layers - choice.count + 1)
        runs = len(runs_of(found.layers, view.layer_indices))
        return replace(found, most=found.most + (most_runs - runs) * seam_size(view))


def _resolved(config: MethodConfig) -> MethodConfig:
    unit, seam = config.unit or "layers", config.seam or "none"
    if unit != "layers":
        reason = f"method.unit {unit} is chosen by the change of the predictions"
        refuse_ignored(config, ("layer_metric",), reason)
        refuse_ignored(config, ("seam", "ridge"), f"method.unit {unit} deletes no layers")
        return replace(resolve_deletion(config), unit=unit, layer_metric=None)
    config = replace(resolve_deletion(config), unit=unit, seam=seam)
    if seam == "none":
        refuse_ignored(config, ("ridge",), "method.seam is none")
        return config
    return replace(config, ridge=checked_ridge(config))


def _built(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    del track
    unit = config.unit or "layers"
    if unit != "layers":
        return DropBlocks(unit, configured_layers(resolve_num_blocks(config, unit, view)))
    layers = configured_layers(resolve_num_layers(config, view))
    if config.seam == "linear":
        return SeamedDrop(layers, checked_ridge(config))
    return DropMethod(layers)


def _obstacle(config: MethodConfig) -> str | None:
    if config.unit not in (None, "layers"):
        return "method.unit measures blocks in the whole model: leave it unset"
    if config.seam not in (None, "none"):
        return "method.seam adds a matrix to layers: set method.seam=none"
    return None


DROP_METHOD: Final = Registered(
    name="drop",
    ignores="deletes layers and scores no components",
    resolve=_resolved,
    build=_built,
    obstacle=_obstacle,
)
