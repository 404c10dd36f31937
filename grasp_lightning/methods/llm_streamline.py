"""A span of layers replaced by one layer, which is trained to compute what the span computes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from grasp_lightning.config import MethodConfig, MethodOptions, StreamlineOptions
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods.base import Decision, Registered, Track
from grasp_lightning.methods.blocks import blocks
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.layer_choice import LayerChoice, configured_layers
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.options import filled, keys_of, resolve_deletion
from grasp_lightning.methods.prediction import Layers, Outlook, Prediction, outlook_of
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import (
    DropLayers,
    Operation,
    OptionValue,
    Plan,
    RemoveBlock,
    SetWeights,
)
from grasp_lightning.stats.base import Needs, SpanTraining, Statistics, Step

NAME: Final = "llm_streamline"
TRAIN_LAYER: Final = "train_layer"
_DEFAULTS: Final = StreamlineOptions(
    replacement="layer", epochs=10, learning_rate=2e-4, step_windows=8
)


class StreamlineMethod(LayerwiseMethod):
    """Replace contiguous layers by one that starts as a copy of the first and is then trained.

    Of all spans of n + 1 layers, the one whose input and output have the highest mean cosine is
    replaced, so that n layers are deleted. The new layer is trained on the calibration windows to
    give the output of the span from its input: mean squared error, AdamW with weight decay 1e-3,
    and a cosine from ``learning_rate`` to 2.5 % of it.

    Deviations: similarity is a mean over all tokens, read at the layers, while the public code
    averages 1/2 + cos/2 over 50 random texts and takes the last state after the final norm. The
    weights with the lowest error on one window of ten are kept; the public code keeps the last
    ones. Gradients are clipped to norm 1; the public code clips at 5. The publication trains one
    epoch on 100,000 windows of 2048 tokens; here a few hundred windows are usual, so there are 10
    epochs in steps of 8 windows. The public code takes 8 x 16 windows per step and drops the rest:
    on 64 windows it never steps, and fails as it loads weights that it has not kept.

    ``mlp`` is not the network of the publication, d to 4d to d with ReLU, which no ordinary
    architecture can hold as a layer. It is the first layer without its attention: the MLP, norms
    and activation of the family.

    Source: Chen et al., "Streamlining Redundant Layers to Compress Large Language Models",
    arXiv:2403.19135.

    Args:
        layers: How the span is chosen.
        training: The options of the training, complete.
    """

    deletes_layers = True

    def __init__(self, layers: LayerChoice, training: StreamlineOptions) -> None:
        super().__init__(NAME, "https://arxiv.org/abs/2403.19135", layers)
        self._training = training

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        chosen = self._training
        return {
            **self._layers.options,
            "replacement": chosen.replacement,
            "epochs": chosen.epochs,
            "learning_rate": chosen.learning_rate,
            "step_windows": chosen.step_windows,
        }

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes for the smallest and for the largest span."""
        prediction = super().predict(view)
        return replace(prediction, num_layers=prediction.num_layers - 1, is_span=True)

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        if plan.dropped_layers:
            return None
        chosen = self._training
        assert chosen.epochs is not None  # they are complete
        assert chosen.learning_rate is not None
        assert chosen.step_windows is not None
        removed = _removed(model, layers[0], chosen)
        training = SpanTraining(
            layers=layers,
            parameters=_parameters(model, layers[0], removed),
            removed=removed,
            epochs=chosen.epochs,
            learning_rate=chosen.learning_rate,
            step_windows=chosen.step_windows,
        )
        return Step(name=TRAIN_LAYER, needs=Needs(span_training=training))

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        training = step.needs.span_training
        assert training is not None  # the step requested it
        return Decision(operations=_operations(model, training), tensors=stats.trained)

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        removed = _removed(view, layers[0], self._training)
        return outlook_of(view, (*removed, DropLayers(layers=layers[1:])))


def _operations(view: DecoderView, training: SpanTraining) -> tuple[Operation, ...]:
    first, *others = training.layers
    trained = SetWeights(module=f"{view.layers_name}.{first}", parameters=training.parameters)
    return (*training.removed, trained, DropLayers(layers=tuple(others)))


def _parameters(view: DecoderView, index: int, removed: tuple[RemoveBlock, ...]) -> tuple[str, ...]:
    """Return the names of a layer's parameters outside of removed blocks."""
    prefix = f"{view.layers_name}.{index}."
    linears = (name.removeprefix(prefix) for removal in removed for name in removal.modules)
    gone = {name.partition(".")[0] for name in linears}
    names = (name for name, _ in view.layer(index).named_parameters())
    return tuple(name for name in names if name.partition(".")[0] not in gone)


def _removed(view: DecoderView, index: int, training: StreamlineOptions) -> tuple[RemoveBlock, ...]:
    """Return the removal of a layer's attention, if only the MLP replaces the span."""
    if training.replacement == "layer":
        return ()
    _, attention = blocks(view, index)
    if not attention:
        raise ModelError(
            f"method.replacement is mlp, but layer {index} has no linears in attention to remove; "
            "set method.replacement=layer"
        )
    name = f"{view.layers_name}.{index}.attention"
    return (RemoveBlock(block=name, modules=attention),)


def _resolved(config: MethodConfig) -> MethodConfig:
    config = resolve_deletion(filled(config, _DEFAULTS, unused=keys_of(MethodOptions)))
    layers = config.layers
    if layers is not None and (
        len(layers) == 1 or layers != tuple(range(layers[0], layers[-1] + 1))
    ):
        raise ConfigError(
            f"method.layers={list(layers)}: method {NAME} replaces contiguous layers by one, so "
            "name at least two without a gap, such as [4,5,6]"
        )
    _check_training(config)
    return config


def _check_training(config: MethodConfig) -> None:
    wrong = {
        "method.epochs must be at least 0": (config.epochs or 0) < 0,
        "method.learning_rate must be above 0": not 0 < (config.learning_rate or 0.0) < math.inf,
        "method.step_windows must be at least 1": (config.step_windows or 0) < 1,
    }
    for expected, is_wrong in wrong.items():
        if is_wrong:
            value = getattr(config, expected.removeprefix("method.").partition(" ")[0])
            raise ConfigError(f"{expected}, got {value}")


def _built(config: MethodConfig, view: DecoderView, track: Track) -> StreamlineMethod:
    del track
    first = config.layers[0] if config.layers else view.layer_indices[0]
    dense = count_parameters(view.model)
    also = dense - parameters_after(view, _removed(view, first, config))
    config = resolve_num_layers(config, view, also=also)
    return StreamlineMethod(configured_layers(config), config)


LLM_STREAMLINE: Final = Registered(
    name=NAME,
    options=StreamlineOptions,
    ignores="replaces contiguous layers by one trained layer",
    resolve=_resolved,
    build=_built,
)
