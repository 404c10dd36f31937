"""Deletion of the layers of lowest importance: a Taylor score, or the loss without a layer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from grasp_lightning.config import CriterionChoice, MethodConfig, ShortenedLlamaOptions
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.base import Registered, Track
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.layer_choice import GRADIENTS, LayerChoice
from grasp_lightning.methods.options import check_protected, resolve_number
from grasp_lightning.methods.removal import REMOVALS, layer_part
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import OptionValue
from grasp_lightning.stats.base import Needs, Statistics, Step

SHORTENED_LLAMA: Final = "shortened_llama"
TAYLOR_SCORES: Final = "layer_taylor_scores"
LOSSES: Final = "layer_removal_losses"

_DEFAULT: Final[CriterionChoice] = "taylor_plus"
# Of the criterion with "plus" in its name, as published.
_PROTECT_FIRST, _PROTECT_LAST = 4, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceChoice(LayerChoice):
    """A number of layers, those of lowest importance that are not protected.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834. ``taylor``: the score of a layer is
    the sum of ``|w dL/dw|`` over all its parameters, with the gradient of the loss over all
    calibration windows. ``perplexity``: the loss of the model without the layer. All layers are
    scored once, on the dense model. The public code uses 10 texts of 128 tokens of BookCorpus.

    Attributes:
        criterion: The importance; ``taylor_plus`` is ``taylor`` with other defaults.
        protect_first: Number of layers at the start that are never chosen.
        protect_last: The same at the end.
    """

    criterion: CriterionChoice
    protect_first: int
    protect_last: int

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the choice depends on."""
        return {
            "num_layers": self.num_layers,
            "criterion": self.criterion,
            "protect_first": self.protect_first,
            "protect_last": self.protect_last,
        }

    @property
    def step_name(self) -> str:
        """Name of the step that measures the importance."""
        return REMOVALS if self.criterion == "perplexity" else GRADIENTS

    @property
    def score_key(self) -> str:
        """Name under which the importance is stored."""
        return LOSSES if self.criterion == "perplexity" else TAYLOR_SCORES

    def check(self, num_layers: int) -> None:
        """Refuse more layers than are not protected: a ``ConfigError``."""
        free = min(len(self._free(num_layers)), num_layers - 1)
        if self.count > max(free, 0):
            protected = f"the first {self.protect_first} and the last {self.protect_last}"
            raise ConfigError(
                f"method.num_layers is {self.count}, but only {max(free, 0)} of the model's "
                f"{num_layers} decoder layers may be deleted: {protected} are protected, and one "
                "must remain; lower method.num_layers, method.protect_first or method.protect_last"
            )

    def candidates(self, view: DecoderView) -> tuple[int, ...]:
        """Return the layers that are not protected."""
        return self._free(view.num_layers)

    def step(self, model: DecoderView) -> Step:
        """Return the step that scores all layers."""
        self.check(model.num_layers)
        if self.criterion == "perplexity":
            layers = tuple(layer_part(model, index) for index in model.layer_indices)
            needs = Needs(removables=layers, removal_measure="loss")
        else:
            needs = Needs(layer_gradients=model.layer_indices)
        return Step(name=self.step_name, needs=needs)

    def values(self, stats: Statistics) -> Tensor | None:
        """Return the importance of every layer, float32, ``(L,)``; None without a measurement."""
        losses, scores = stats.removal_losses, stats.layer_scores
        measured = losses if self.criterion == "perplexity" else scores
        return torch.tensor(list(measured.values())) if measured else None

    def _order(self, values: Tensor) -> list[int]:
        # A stable sort gives ties to the lower index, for any number of threads.
        order: list[int] = torch.sort(values, stable=True).indices.tolist()
        free = self._free(len(values))
        return [index for index in order if index in free]

    def _free(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(self.protect_first, num_layers - self.protect_last))


def _resolved(config: MethodConfig) -> MethodConfig:
    config = resolve_number(config)
    check_protected(config)
    criterion = config.criterion or _DEFAULT
    is_plus = criterion == "taylor_plus"
    first, last = config.protect_first, config.protect_last
    return replace(
        config,
        criterion=criterion,
        protect_first=_PROTECT_FIRST * is_plus if first is None else first,
        protect_last=_PROTECT_LAST * is_plus if last is None else last,
    )


class ShortenedLlamaMethod(DropMethod):
    """Delete the layers of lowest importance.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834.
    """

    def __init__(self, layers: ImportanceChoice) -> None:
        super().__init__(layers, SHORTENED_LLAMA, "https://arxiv.org/abs/2402.02834")
        self.skips_parts = layers.criterion == "perplexity"


def _built(config: MethodConfig, view: DecoderView, track: Track) -> ShortenedLlamaMethod:
    del track
    assert config.criterion is not None  # complete options
    choice = ImportanceChoice(
        num_layers=config.num_layers or 1,
        criterion=config.criterion,
        protect_first=config.protect_first or 0,
        protect_last=config.protect_last or 0,
    )
    choice.check(view.num_layers)
    solved = resolve_num_layers(config, view, candidates=choice.candidates(view))
    return ShortenedLlamaMethod(replace(choice, num_layers=solved.num_layers))


SHORTENED_LLAMA_METHOD: Final = Registered(
    name=SHORTENED_LLAMA,
    options=ShortenedLlamaOptions,
    ignores="deletes the layers that its criterion scores lowest",
    resolve=_resolved,
    build=_built,
)
