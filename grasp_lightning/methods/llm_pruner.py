"""LLM-Pruner: remove the heads and channels on which the loss depends least, per layer."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor

from grasp_lightning.config import Grouping, Importance, LlmPrunerOptions, MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.layer_choice import GRADIENTS
from grasp_lightning.methods.options import check_protected, filled, resolve_share
from grasp_lightning.methods.prediction import Prediction, predict_units
from grasp_lightning.methods.unit_removal import (
    in_order,
    removable_units,
    size_to_remove,
    stored_scores,
    unit_operation,
    unit_tensors,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.units import Units
from grasp_lightning.plan import Operation, OptionValue, Plan
from grasp_lightning.stats.base import Needs, Statistics, Step
from grasp_lightning.stats.unit_gradients import unit_importance

NAME: Final = "llm_pruner"
# The script of the publication cuts layers 4 to 29 of 32.
_DEFAULTS: Final = LlmPrunerOptions(
    importance="taylor", grouping="heads", protect_first=4, protect_last=2
)


class LlmPruner(CompressionMethod):
    """Remove whole key/value groups and MLP channels, the same share of each layer.

    The score of a unit is the sum over all its weights w of

    - ``taylor``: ``|w g|``, g being the gradient of the mean loss per predicted token;
    - ``taylor_second``: ``w^2 h``, h being the mean over windows of the squared gradient of the
      mean loss of one window, instead of the diagonal of the Hessian matrix;
    - ``taylor_mixed``: ``|w g - w^2 h / 2|``;
    - ``l2``: ``w^2``.

    A unit is a hidden channel, or a key/value group with the query heads that read it. Of each
    layer that is not protected, the units with the lowest scores are removed, and weights that stay
    do not change. All these layers lose the same number of groups and of channels. Among the
    numbers that remove the requested share, those are taken whose shares of groups and channels
    differ least.

    Source: Ma et al., "LLM-Pruner", arXiv:2305.11627, element-wise importance, groups summed. With
    grouped queries, the public code adds the score of query head i to key/value group i modulo G,
    although the head reads another group: ``grouping: released``. ``heads`` adds it to the group
    that the head reads. Both remove the same heads with a group. Other differences: the mixed
    importance of attention raises an error in the public code. Its text is 10 windows of 64 tokens
    of BookCorpus; here it is the calibration text.

    Args:
        cut: How many units are removed, by the reader of their block.
        layers: Numbers of the layers that get smaller.
        importance: How a weight is scored.
        grouping: Which group the score of a query head counts for.
        options: The options of the plan.
    """

    name = NAME
    reference = "https://arxiv.org/abs/2305.11627"

    def __init__(
        self,
        cut: Mapping[str, int],
        layers: tuple[int, ...],
        importance: Importance,
        grouping: Grouping,
        options: Mapping[str, OptionValue],
    ) -> None:
        self._cut = cut
        self._layers = layers
        self._importance = importance
        self._grouping = grouping
        self._options = options

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The share, importance, grouping and protected layers."""
        return self._options

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the step that scores all units, once."""
        if plan.operations:
            return None
        if self._importance == "l2":
            return Step(name=GRADIENTS)
        units = removable_units(model, self._layers, NAME)
        needs = Needs(units=units, importance=self._importance, grouping=self._grouping)
        return Step(name=GRADIENTS, needs=needs)

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Remove the units with the lowest scores of each block."""
        del step
        blocks = removable_units(model, self._layers, NAME)
        scores: Mapping[str, Tensor] = stats.unit_scores
        if self._importance == "l2":
            scores = {x.reader: unit_importance(model, x, "l2", {}, self._grouping) for x in blocks}
        operations: list[Operation] = []
        tensors: dict[str, Tensor] = {}
        for units in blocks:
            if number := self._cut[units.reader]:
                kept = in_order(scores[units.reader])[number:]
                operations.append(unit_operation(units, kept))
                tensors |= unit_tensors(model, units, kept)
        return Decision(operations=tuple(operations), tensors=tensors, scores=stored_scores(scores))

    def predict(self, view: DecoderView) -> Prediction:
        """Return the exact sizes; the data decides which units are removed."""
        blocks = removable_units(view, self._layers, NAME)
        kept = {x: range(x.number - self._cut[x.reader]) for x in blocks}
        operations = tuple(
            unit_operation(x, chosen) for x, chosen in kept.items() if len(chosen) < x.number
        )
        return predict_units(view, self._layers, operations)


def numbers_to_remove(blocks: Sequence[Units], ratio: float, dense: int) -> dict[str, int]:
    """Return how many units of each block are removed, by its reader.

    Args:
        blocks: Attention and MLP of each layer that gets smaller.
        ratio: Share of all parameters to remove.
        dense: Parameters of the whole model.

    A share that is out of reach is a ``ConfigError``.
    """
    heads = [units for units in blocks if units.are_heads]
    channels = [units for units in blocks if not units.are_heads]
    num_groups, num_channels = (max(x.number for x in part) for part in (heads, channels))
    most = _size(heads, num_groups) + _size(channels, num_channels)
    advice = ", method.protect_first or method.protect_last"
    target = size_to_remove(ratio, dense, most, advice)
    choices: list[tuple[bool, float, int, int]] = []
    for groups in range(num_groups):
        rest = target - _size(heads, groups)
        number = bisect_left(range(num_channels), rest, key=lambda n: _size(channels, n))
        if number < num_channels:
            difference = abs(groups / num_groups - number / num_channels)
            choices.append((rest < 0, difference, groups, number))
    _, _, groups, number = min(choices)
    return {**_numbers(heads, groups), **_numbers(channels, number)}


def _numbers(blocks: Sequence[Units], number: int) -> dict[str, int]:
    """Return the number of removed units of each block, if the largest block loses some number.

    Smaller blocks lose the same share, rounded up. One unit stays.
    """
    most = max(units.number for units in blocks)
    shares = {units: -(-number * units.number // most) for units in blocks}
    return {units.reader: min(count, units.number - 1) for units, count in shares.items()}


def _size(blocks: Sequence[Units], number: int) -> int:
    """Return the number of parameters of ``_numbers``."""
    numbers = _numbers(blocks, number)
    return sum(units.size * numbers[units.reader] for units in blocks)


def _resolved(config: MethodConfig) -> MethodConfig:
    config = resolve_share(config)
    check_protected(config)
    return filled(config, _DEFAULTS, unused=("name",))


def _built(config: MethodConfig, view: DecoderView, track: Track) -> LlmPruner:
    del track
    importance, grouping, ratio = config.importance, config.grouping, config.removed_ratio
    first, last = config.protect_first or 0, config.protect_last or 0
    assert importance is not None  # complete options
    assert grouping is not None
    assert ratio is not None
    layers = view.layer_indices[first : max(len(view.layer_indices) - last, 0)]
    if not layers:
        raise ConfigError(
            f"method {NAME} protects the first {first} and the last {last} of the model's "
            f"{view.num_layers} decoder layers, so none can get smaller; lower "
            "method.protect_first or method.protect_last"
        )
    blocks = removable_units(view, layers, NAME)
    options = {
        "removed_ratio": ratio,
        "importance": importance,
        "grouping": grouping,
        "protect_first": first,
        "protect_last": last,
    }
    cut = numbers_to_remove(blocks, ratio, count_parameters(view.model))
    return LlmPruner(cut, layers, importance, grouping, options)


LLM_PRUNER: Final = Registered(
    name=NAME,
    options=LlmPrunerOptions,
    ignores="removes heads and channels by importance",
    resolve=_resolved,
    build=_built,
)
