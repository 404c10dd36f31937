"""Methods that set weights of linears to zero, one decoder layer after the other.

Legend: N output and M input features of a linear.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from grasp_lightning.config import MethodConfig, PatternChoice
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.linalg.sparsity import smallest_sparsity
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.dealing import dealt
from grasp_lightning.methods.layer_choice import LayerChoice, configured_layers
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.low_rank import DEFAULT_REMOVED_RATIO
from grasp_lightning.methods.options import (
    check_share,
    named_layers,
    refuse_ignored,
    resolve_layers,
)
from grasp_lightning.methods.prediction import Layers, Outlook
from grasp_lightning.methods.truncation import CURVATURE
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import weights_of
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import OptionValue, Plan, SparsifyLinear, groups_of
from grasp_lightning.stats.base import MomentKind, Moments, Needs, Statistics, Step

Shapes = Mapping[str, tuple[int, int]]
"""Output and input features ``(N, M)`` of weights, by full name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZerosRule:
    """How many weights become zero, and in which pattern.

    Attributes:
        pattern: Where the zeros are.
        removed_ratio: Share of all parameters of the model; None for a pattern n:m.
        num_parameters: Parameters of the whole model.
        num_zeros: Zeros in a weight ``(N, M)`` at a sparsity, for the unstructured pattern.
    """

    pattern: PatternChoice
    removed_ratio: float | None
    num_parameters: int
    num_zeros: Callable[[int, int, float], int]

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that the zeros depend on, for the plan."""
        ratio = {} if self.removed_ratio is None else {"removed_ratio": self.removed_ratio}
        return {"pattern": self.pattern, **ratio}

    def sparsity(self, shapes: Shapes) -> float:
        """Return the share of zeros in each weight: the smallest that reaches the removed ratio.

        Raises:
            ConfigError: If it is out of reach.
            ModelError: If a weight cannot have the pattern.
        """
        groups = groups_of(self.pattern)
        if groups is not None:
            for name, (_, columns) in shapes.items():
                if columns % groups[1]:
                    raise ModelError(
                        f"{name} has {columns} inputs, which pattern {self.pattern} cannot divide "
                        f"into groups of {groups[1]}: use pattern unstructured, or leave its layer "
                        "out (method.layers)"
                    )
            return groups[0] / groups[1]
        assert self.removed_ratio is not None  # only a pattern n:m has none
        # Rounded to whole parameters, so that the share reported by a run can be requested again.
        target = max(round(self.removed_ratio * self.num_parameters), 1)
        largest = self.total(shapes, math.nextafter(1, 0))
        if target > largest:
            raise ConfigError(
                f"method.removed_ratio {self.removed_ratio} is out of reach: the feasible range is "
                f"0 to {math.floor(1e4 * largest / self.num_parameters) / 1e4:.4f}, the latter "
                "with zeros in almost all weights of the linears"
            )
        return smallest_sparsity(partial(self.total, shapes), target)

    def total(self, shapes: Shapes, sparsity: float) -> int:
        """Return the number of zeros in all weights, unstructured."""
        return sum(self.num_zeros(*shape, sparsity) for shape in shapes.values())

    def zeros(self, shape: tuple[int, int], sparsity: float) -> int:
        """Return the number of zeros in one weight."""
        groups = groups_of(self.pattern)
        if groups is None:
            return self.num_zeros(*shape, sparsity)
        return shape[0] * shape[1] // groups[1] * groups[0]


class SparsityMethod(LayerwiseMethod):
    """Sets weights of all linears to zero, one decoder layer after the other.

    The inputs of a layer are measured after those before it are pruned, with its own linears still
    dense, as published. Embeddings, head, norms and biases stay.

    Args:
        name: Its ``method.name``.
        layers: Which layers are pruned.
        rule: How many weights become zero.
        track: Shows progress.

    Attributes:
        moment_kind: What is measured of the inputs.
    """

    moment_kind: ClassVar[MomentKind]
    reference: str

    def __init__(self, name: str, layers: LayerChoice, rule: ZerosRule, track: Track) -> None:
        super().__init__(name, self.reference, layers)
        self._rule = rule
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        return {**self._layers.options, **self._rule.options}

    @abstractmethod
    def _pruned(
        self, weight: Tensor, moments: Moments, sparsity: float, groups: tuple[int, int] | None
    ) -> Tensor:
        """Return a weight ``(N, M)`` with zeros, on its device, which has the moments too."""

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        """Request the inputs of the first layer that is not pruned yet."""
        done = {op.module for op in plan.operations if isinstance(op, SparsifyLinear)}
        for position, index in enumerate(layers):
            waiting = tuple(name for name in model.linears(index) if name not in done)
            if waiting:
                return Step(
                    name=CURVATURE,
                    needs=Needs(moments=waiting, moment_kinds=frozenset({self.moment_kind})),
                    layers=layers[position:],
                    sparsity=self._rule.sparsity(_shapes(model, layers)),
                )
        return None

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Prune the linears of the layer; the processes share them."""
        sparsity = step.sparsity
        assert sparsity is not None  # _step has set it
        groups = groups_of(self._rule.pattern)

        def pruned(name: str, weight: Tensor) -> Tensor:
            found = stats.moments[name]
            value: Tensor = getattr(found, self.moment_kind)
            moments = Moments(**{self.moment_kind: value.to(weight.device)})
            return self._pruned(weight, moments, sparsity, groups).to(weight.dtype).cpu()

        operations, tensors = [], {}
        weights = weights_of(model, step.needs.moments)
        for name, weight in dealt(weights, pruned, self._track, "prune"):
            tensors[f"{name}.weight"] = weight
            zeros = self._rule.zeros((weight.shape[0], weight.shape[1]), sparsity)
            operations.append(SparsifyLinear(module=name, pattern=self._rule.pattern, zeros=zeros))
        return Decision(operations=tuple(operations), tensors=tensors)

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        """Return that nothing is removed: all weights are stored, once more in the run folder."""
        shapes = _shapes(view, layers)
        sparsity = self._rule.sparsity(shapes)
        operations = tuple(
            SparsifyLinear(
                module=name, pattern=self._rule.pattern, zeros=self._rule.zeros(shape, sparsity)
            )
            for name, shape in shapes.items()
        )
        stored = sum(rows * columns for rows, columns in shapes.values())
        return Outlook(operations, count_parameters(view.model), stored)


def _shapes(view: DecoderView, layers: Layers) -> dict[str, tuple[int, int]]:
    return {
        name: (linear.out_features, linear.in_features)
        for index in layers
        for name, linear in view.linears(index).items()
    }


def sparsity_method(
    name: str, kind: type[SparsityMethod], num_zeros: Callable[[int, int, float], int]
) -> Registered:
    """Return the entry of a method.

    Args:
        name: Its ``method.name``.
        kind: Its class.
        num_zeros: Zeros in a weight ``(N, M)`` at a sparsity, for the unstructured pattern.
    """

    def build(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
        if named_layers(config) is None:
            config = replace(config, layers=view.layer_indices)
        rule = ZerosRule(
            pattern=config.pattern or "unstructured",
            removed_ratio=config.removed_ratio,
            num_parameters=count_parameters(view.model),
            num_zeros=num_zeros,
        )
        return kind(name, configured_layers(config), rule, track)

    return Registered(
        name=name, ignores="sets single weights to zero", resolve=_resolved, build=build
    )


def _resolved(config: MethodConfig) -> MethodConfig:
    config = replace(config, pattern=config.pattern or "unstructured")
    if named_layers(config) is None:
        refuse_ignored(config, ("layer_metric",), "all layers are pruned")
    else:
        config = resolve_layers(config)
    if config.pattern != "unstructured":
        reason = f"pattern {config.pattern} sets half of the linears' weights to zero"
        refuse_ignored(config, ("removed_ratio",), reason, "use pattern unstructured")
        return config
    ratio = DEFAULT_REMOVED_RATIO if config.removed_ratio is None else config.removed_ratio
    check_share(ratio)
    return replace(config, removed_ratio=ratio)
