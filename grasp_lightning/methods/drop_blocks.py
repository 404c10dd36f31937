"""Removal of single attention or MLP blocks; the rest of their layers stays."""

from collections.abc import Mapping
from dataclasses import replace

from grasp_lightning.config import BlockChoice, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.methods.budget import nearest_number
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.options import named_layers
from grasp_lightning.methods.prediction import Layers, Prediction, outlook_of, predict_layers
from grasp_lightning.methods.removal import (
    REMOVALS,
    block_parts,
    stored_prices,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.plan import OptionValue, Plan, RemoveBlock, SelectLayers
from grasp_lightning.stats.base import Needs, Removable, Statistics, Step


class DropBlocks(CompressionMethod):
    """Remove the attention or MLP blocks whose removal alone changes the predictions least.

    The price of a block is the mean Kullback-Leibler divergence of the model without it from the
    dense model, in nats per predicted token, on ``statistics.priced_windows`` windows. The paper's
    is one minus the cosine similarity of the hidden states before the block's norm and after its
    residual sum. It compares hidden states, not predictions, so it may choose other blocks. As in
    the paper, all blocks are chosen at once. A removed block keeps its norm, its biases and its
    place in the cache; the paper removes them.

    Source: He et al., "What Matters in Transformers?", arXiv:2406.15786, Attention Drop and MLP
    Drop.

    Args:
        unit: Which blocks.
        layers: The layers of the blocks, or how many blocks; its metric is not read.
    """

    name = "drop"
    reference = "https://arxiv.org/abs/2406.15786"

    def __init__(self, unit: BlockChoice, layers: LayerChoice) -> None:
        self._unit = unit
        self._layers = layers
        self.skips_parts = layers.layers is None

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The kind of block, and the layers or the number of blocks."""
        if self._layers.layers is not None:
            return {"unit": self._unit, "layers": self._layers.layers}
        return {"unit": self._unit, "num_layers": self._layers.num_layers}

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Request the price of every block; explicit layers need no measurement."""
        if plan.removed_blocks:
            return None
        parts = self._parts(model) if self.skips_parts else ()
        return Step(name=REMOVALS, needs=Needs(removables=parts))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Remove the cheapest blocks, or those of the explicit layers; ties go to lower layers."""
        del step
        parts, losses = self._parts(model), stats.removal_losses
        if self.skips_parts:
            parts = tuple(sorted(parts, key=lambda part: losses[part.name]))[: self._layers.count]
        layers = tuple(sorted(part.layer for part in parts))
        return Decision(
            operations=(SelectLayers(layers=layers), *self._removal(model, layers)),
            scores=stored_prices(losses),
        )

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes for the smallest and for the largest layers.

        Raises:
            ConfigError: If more blocks are to be removed than the model has.
        """
        self._layers.check(view.num_layers)
        candidates = tuple(part.layer for part in self._parts(view))
        if self._layers.count > len(candidates):
            raise ConfigError(
                f"method.num_layers is {self._layers.count}, but the model has {len(candidates)} "
                f"{self._unit} blocks that can be removed"
            )
        return predict_layers(
            view,
            candidates,
            self._layers.count,
            lambda layers: outlook_of(view, self._removal(view, layers)),
        )

    def _removal(self, view: DecoderView, layers: Layers) -> tuple[RemoveBlock, ...]:
        return tuple(
            RemoveBlock(block=part.name, modules=part.linears)
            for part in self._parts(view)
            if part.layer in layers
        )

    def _parts(self, view: DecoderView) -> tuple[Removable, ...]:
        return removable_blocks(view, self._unit, self._layers.layers)


def removable_blocks(
    view: DecoderView, unit: BlockChoice, layers: Layers | None = None
) -> tuple[Removable, ...]:
    """Return the blocks of one kind, by layer, in all layers or in some.

    Raises:
        ModelError: If there is none, or one of the given layers has none.
    """
    wanted = view.layer_indices if layers is None else layers
    parts = [part for index in wanted for part in block_parts(view, index)]
    found = tuple(part for part in parts if part.name.endswith(f".{unit}"))
    without = sorted({*wanted} - {part.layer for part in found})
    if without and (layers is not None or not found):
        raise ModelError(
            f"layer {without[0]} of {type(view.model).__name__} has no {unit} block of its own "
            "whose linears can be removed: choose other layers, or set method.unit=layers"
        )
    return found


def resolve_num_blocks(config: MethodConfig, unit: BlockChoice, view: DecoderView) -> MethodConfig:
    """Return the options with the number of blocks whose removal comes nearest to the share.

    A share that is out of reach is a ``ConfigError`` with the feasible range.
    """
    if named_layers(config) is not None:
        return config
    dense = count_parameters(view.model)
    saved = [
        dense - parameters_after(view, [RemoveBlock(block=part.name, modules=part.linears)])
        for part in removable_blocks(view, unit)
    ]
    return replace(config, num_layers=nearest_number(config, dense, saved, f"{unit} blocks"))
