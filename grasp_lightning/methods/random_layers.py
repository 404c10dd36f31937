"""The control of every choice of layers: delete layers drawn at random."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from grasp_lightning.config import MethodConfig, RandomOptions
from grasp_lightning.errors import ModelError
from grasp_lightning.methods.base import Decision, Registered, Track, no_obstacle
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.layer_choice import SELECT, LayerChoice, first_droppable
from grasp_lightning.methods.options import resolve_number
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import OptionValue, SelectLayers
from grasp_lightning.stats.base import Statistics, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomChoice(LayerChoice):
    """A number of layers, drawn uniformly from those that can be deleted.

    Attributes:
        seed: Equal seeds give the same order of layers, for any number of them.
    """

    seed: int

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The number of layers, and the seed."""
        return {"num_layers": self.num_layers, "layer_seed": self.seed}

    def step(self, model: DecoderView) -> Step:
        """Return a step that measures nothing."""
        self.check(model.num_layers)
        return Step(name=SELECT)

    def decide(self, stats: Statistics, dropped_from: DecoderView | None = None) -> Decision:
        """Return the first layers of a random order that can be deleted together.

        Raises:
            ModelError: If there are too few.
        """
        del stats
        assert dropped_from is not None  # the method deletes them
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(dropped_from.num_layers, generator=generator).tolist()
        layers = first_droppable(dropped_from, order, self.count)
        if layers is None:
            raise ModelError(
                f"fewer than {self.count} layers can be deleted together; lower method.num_layers"
            )
        return Decision(operations=(SelectLayers(layers=layers),))


def _built(config: MethodConfig, view: DecoderView, track: Track) -> DropMethod:
    del track
    num_layers = resolve_num_layers(config, view).num_layers
    choice = RandomChoice(num_layers=num_layers, seed=config.layer_seed or 0)
    return DropMethod(choice, "random", "")


RANDOM: Final = Registered(
    name="random",
    ignores="draws layers at random",
    options=RandomOptions,
    resolve=resolve_number,
    build=_built,
    obstacle=no_obstacle,
)
