"""Layer collapse: layers are merged into an earlier one, where the output hardly changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import isnan
from typing import Final

from torch import tensor

from grasp_lightning.config import LacoOptions, MergeChoice, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.options import filled, resolve_number
from grasp_lightning.methods.prediction import Prediction, outlook_of, predict_layers
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import drop_problem
from grasp_lightning.models.merging import merge_problem
from grasp_lightning.plan import MergeLayers, Operation, OptionValue, Plan, TryMerge
from grasp_lightning.stats.base import Needs, Statistics, Step

MERGE = "merge"
SIMILARITY_KEY = "merge.{num_gone}.{base}.similarity"
"""Storage name of the similarity of a tried merge, after some layers are gone."""

_LOWERED = 0.05  # per sweep
# The paper's settings for Llama 2 7B.
_DEFAULTS: Final = LacoOptions(merge="paper", merge_layers=4, interval=2, threshold=0.65)


@dataclass(frozen=True, kw_only=True)
class MergeSearch:
    """Which merge comes next: a function of the operations so far.

    Attributes:
        num_layers: Number of layers to merge away.
        rule: How weights are merged.
        merge_layers: Number of layers that become one (C).
        interval: Layers between an accepted merge and the next trial (I).
        threshold: Similarity that a merge must exceed in the first sweep (T).
    """

    num_layers: int
    rule: MergeChoice
    merge_layers: int
    interval: int
    threshold: float

    def next_merge(
        self, num_layers: int, operations: Sequence[Operation]
    ) -> tuple[MergeLayers, bool] | None:
        """Return the next merge, and whether its trial has passed; None if enough are merged.

        Args:
            num_layers: Number of layers of the dense model.
            operations: Those of the plan so far.
        """
        place = _Place(self, num_layers)
        for operation in operations:
            place.find()
            if isinstance(operation, TryMerge):
                place.tried[operation.base] = operation.sweep
            elif isinstance(operation, MergeLayers):
                place.merge()
        return place.find()

    def merges(self, num_layers: int) -> tuple[MergeLayers, ...]:
        """Return the merges of a search in which every trial passes."""
        found: list[MergeLayers] = []
        while (entry := self.next_merge(num_layers, found)) is not None:
            found.append(entry[0])
        return tuple(found)

    def sweep_of(self, similarity: float) -> int:
        """Return the first sweep whose threshold a similarity exceeds."""
        return next(n for n in count() if similarity > self.threshold - n * _LOWERED)


class _Place:
    """Where the search is, from the top of the model down.

    Attributes:
        left: Original numbers of the layers still in the model.
        position: Position among them of the layer into which the next ones would be merged.
        sweep: Number of earlier sweeps.
        tried: Sweeps that merges would pass in the present model, by their base.
    """

    def __init__(self, search: MergeSearch, num_layers: int) -> None:
        self._search = search
        self.left = list(range(num_layers))
        self._target = num_layers - search.num_layers
        self.sweep = 0
        self.tried: dict[int, int] = {}
        self.position = self._top

    @property
    def _num_absorbed(self) -> int:
        return min(self._search.merge_layers - 1, len(self.left) - self._target)

    @property
    def _top(self) -> int:
        return len(self.left) - 1 - self._num_absorbed

    def find(self) -> tuple[MergeLayers, bool] | None:
        """Go to the next merge that was not tried, or that passes; see ``next_merge``."""
        if self._num_absorbed == 0:
            return None
        while (needed := self.tried.get(self.left[self.position])) is not None:
            if needed <= self.sweep:
                break
            self._descend(1)
        base, *absorbed = self.left[self.position : self.position + 1 + self._num_absorbed]
        merge = MergeLayers(base=base, absorbed=tuple(absorbed), rule=self._search.rule)
        return merge, needed is not None

    def merge(self) -> None:
        """Accept the merge at this position."""
        del self.left[self.position + 1 : self.position + 1 + self._num_absorbed]
        self.tried.clear()
        self._descend(self._search.interval)

    def _descend(self, step: int) -> None:
        self.position = min(self.position - step, self._top)
        if self.position < 0:
            self.position, self.sweep = self._top, self.sweep + 1


class LacoMethod(CompressionMethod):
    """Merge contiguous layers into one, from the top down, while the output stays similar.

    A merge of C layers, ``theta_0 + sum_k (theta_k - theta_0)``, is tried and undone. If the final
    hidden states keep a mean cosine above the threshold T to those of the dense model, the merge is
    accepted and the search continues I layers lower, otherwise one layer lower.

    Differences from the paper:

    - The paper has no target size. Here the search ends when enough layers are merged, and its last
      merge may be smaller. If a sweep over all layers merges too few, another sweep begins at the
      top with a threshold that is lower by 0.05.
    - The similarity is a mean over tokens of a few calibration windows, after the final norm, where
      Hugging Face models have their last hidden state.
    - The search covers all layers; the paper's lowest and highest layer are not options.

    The public code differs from both: it compares whole sentences as single vectors, and merges no
    norms (``merge: released``). Its first trial is at its highest layer minus C. After a merge it
    absorbs ``min(C - 1, layers above)`` layers, where here the position is clamped. It stops at
    layer 0, whatever the size.

    The plan notes each trial, with the sweep that it would pass. So no merge is tried twice on the
    same model, and the plan alone says how the search continues.

    Source: Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse", arXiv:2402.11187,
    Algorithm 1. The defaults, C = 4, I = 2 and T = 0.65, are its settings for Llama 2 7B.
    """

    name = "laco"
    reference = "https://arxiv.org/abs/2402.11187"

    def __init__(self, search: MergeSearch) -> None:
        self._search = search

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        search = self._search
        return {
            "num_layers": search.num_layers,
            "merge": search.rule,
            "merge_layers": search.merge_layers,
            "interval": search.interval,
            "threshold": search.threshold,
        }

    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return the trial of the next merge, or without a measurement the merge that passed."""
        found = self._search.next_merge(model.num_layers, plan.operations)
        if found is None:
            return None
        merge, has_passed = found
        needs = Needs() if has_passed else Needs(merge=merge)
        return Step(name=MERGE, needs=needs, layers=(merge.base, *merge.absorbed))

    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the outcome of a trial, or the merge that passed its trial.

        Raises:
            ValueError: If a needed trial was not measured.
            NumericsError: If the similarity is NaN.
        """
        base, *others = step.layers
        absorbed = tuple(others)
        if step.needs.merge is None:
            merge = MergeLayers(base=base, absorbed=absorbed, rule=self._search.rule)
            return Decision(operations=(merge,))
        similarity = stats.merge_similarity
        if similarity is None:
            raise ValueError("the merge was not tried")
        if isnan(similarity):
            raise NumericsError(
                f"with layers {list(absorbed)} merged into layer {base}, hidden states are NaN or "
                "infinite; check the checkpoint, or set model.dtype to float32 if it is narrower"
            )
        trial = TryMerge(base=base, absorbed=absorbed, sweep=self._search.sweep_of(similarity))
        key = SIMILARITY_KEY.format(num_gone=model.num_layers - len(model.layer_indices), base=base)
        return Decision(operations=(trial,), scores={key: tensor([similarity])})

    def predict(self, view: DecoderView) -> Prediction:
        """Return the sizes, which do not depend on the layers.

        Raises:
            ConfigError: If not even one layer would remain.
            ModelError: If the layers of the model cannot be merged.
        """
        num_layers = self._search.num_layers
        if num_layers >= view.num_layers:
            raise ConfigError(
                f"method.num_layers is {num_layers}, but the model has {view.num_layers} decoder "
                "layers, of which one must remain"
            )
        view.check_droppable()
        problem = merge_problem(view) or drop_problem(view, view.layer_indices[-1:])
        if problem is not None:
            raise ModelError(
                f"method laco cannot merge the decoder layers of {type(view.model).__name__}: "
                f"{problem}"
            )
        merges = self._search.merges(view.num_layers)
        return predict_layers(
            view, view.layer_indices, num_layers, lambda _: outlook_of(view, merges)
        )


def _resolved(config: MethodConfig) -> MethodConfig:
    config = filled(resolve_number(config), _DEFAULTS)
    for key, least in (("merge_layers", 2), ("interval", 1)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise ConfigError(f"method.{key} must be at least {least}, got {value}")
    threshold = config.threshold
    if threshold is not None and not -1 <= threshold < 1:
        raise ConfigError(f"method.threshold must be a cosine from -1 to below 1, got {threshold}")
    return config


def _built(config: MethodConfig, view: DecoderView, track: Track) -> LacoMethod:
    del track
    options = resolve_num_layers(config, view)
    assert options.num_layers
    assert options.merge
    assert options.merge_layers
    assert options.interval
    assert options.threshold is not None  # the configuration is resolved
    return LacoMethod(
        MergeSearch(
            num_layers=options.num_layers,
            rule=options.merge,
            merge_layers=options.merge_layers,
            interval=options.interval,
            threshold=options.threshold,
        )
    )


LACO: Final = Registered(
    name="laco",
    ignores="finds the layers by trials and scores no components",
    resolve=_resolved,
    build=_built,
)
