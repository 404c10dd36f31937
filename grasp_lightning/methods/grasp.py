"""GRASP: gradient-based retention of adaptive singular parameters."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from grasp_lightning.config import (
    GradientOptions,
    GraspOptions,
    MethodConfig,
    PresetName,
    Schedule,
)
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.attribution import attribution_step, keep_best_components
from grasp_lightning.methods.base import CompressionMethod, Decision, Registered, Track, untracked
from grasp_lightning.methods.blocks import blocks, factorize_operations, waiting_ranks
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.layer_choice import LayerChoice, configured_layers
from grasp_lightning.methods.layerwise import LayerwiseMethod
from grasp_lightning.methods.options import (
    check_share,
    chosen_preset,
    filled,
    given,
    keys_of,
    named_layers,
    refuse_ignored,
    resolve_layers,
)
from grasp_lightning.methods.prediction import Layers, Outlook, outlook_of
from grasp_lightning.methods.rank_rules import RankRule, configured_rule
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import OptionValue, Plan
from grasp_lightning.stats.base import Scoring, Statistics, Step, decided_store

DEFAULT_KEEP_RATIO: Final = 0.1
_REFERENCE: Final = "https://arxiv.org/abs/2501.00339"
# Source: Liu et al., "GRASP", arXiv:2501.00339, Eq. 6; one_shot: section 3.4 on pruning strategies.
_PAPER: Final = GraspOptions(
    preset="paper", terms="full", reduction="absolute", score="taylor", schedule="one_shot"
)
# The public code (LyoAI/GRASP), with labels shifted once.
_RELEASED: Final = GraspOptions(
    preset="released", terms="sigma", reduction="signed", score="taylor", schedule="iterative"
)
PRESETS: Final[Mapping[PresetName, GraspOptions]] = {"paper": _PAPER, "released": _RELEASED}


class Grasp(LayerwiseMethod):
    """Score singular components by loss gradients and keep the best of each matrix.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Algorithm 1.

    Args:
        layers: How redundant layers are chosen.
        scoring: How components are scored; the defaults are the paper's Eq. 6.
        rank_rule: How many components each weight keeps.
        schedule: ``one_shot``: all layers in one pass; ``iterative``: from the last layer down, MLP
            before attention, each scored with everything above it replaced.
        score_all_layers: Also score the other layers, in groups as large as the chosen one;
            ``one_shot`` only.
        track: Shows the progress of factorisations.
    """

    def __init__(
        self,
        *,
        layers: LayerChoice,
        scoring: Scoring,
        rank_rule: RankRule,
        schedule: Schedule = "one_shot",
        score_all_layers: bool = False,
        track: Track = untracked,
    ) -> None:
        super().__init__("grasp", _REFERENCE, layers)
        self._scoring = scoring
        self._rule = rank_rule
        self._schedule = schedule
        self._score_all_layers = score_all_layers
        self._track = track

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""
        options = {**self._layers.options, **self._rule.options, "score": self._scoring.score}
        if self._scoring.score != "magnitude":
            options |= {"terms": self._scoring.terms, "reduction": self._scoring.reduction}
        return options | {"schedule": self._schedule}

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        waiting = waiting_ranks(model, plan, layers, self._rule)
        if not waiting:
            return None
        if self._schedule == "iterative":
            return self._block_step(model, layers, waiting)
        modules = [name for index in layers for name in model.linears(index)]
        step = attribution_step(model, modules, self._scoring, ranks=waiting, track=self._track)
        if not self._score_all_layers:
            return step
        others = [index for index in model.layer_indices if index not in layers]
        groups = (others[start:][: len(layers)] for start in range(0, len(others), len(layers)))
        more = tuple(tuple(name for i in group for name in model.linears(i)) for group in groups)
        return replace(step, needs=replace(step.needs, more_groups=more))

    def _block_step(self, model: DecoderView, layers: Layers, waiting: Mapping[str, int]) -> Step:
        """Return the step of the highest block that is not replaced yet."""
        index, modules = next(
            (index, group)
            for index in reversed(layers)
            for group in blocks(model, index)
            if any(name in waiting for name in group)
        )
        step = attribution_step(model, modules, self._scoring, ranks=waiting, track=self._track)
        return replace(step, layers=tuple(layer for layer in layers if layer <= index))

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        del model
        scores: Mapping[str, Tensor] = stats.component_scores
        if self._scoring.score == "magnitude":
            scores = {name: basis.s for name, basis in step.bases.items()}
        ranks = step.ranks
        if ranks is None:
            shapes = {n: (len(basis.u), basis.vh.shape[1]) for n, basis in step.bases.items()}
            ranks = self._rule.ranks(shapes)
        decision = keep_best_components(step.bases, scores, ranks, decided_store(stats))
        return replace(decision, scores={**decision.scores, **stats.more_scores})

    def _outlook(self, view: DecoderView, layers: Layers) -> Outlook:
        return outlook_of(view, factorize_operations(view, layers, self._rule))


def _resolved(config: MethodConfig) -> MethodConfig:
    _check_amount(config)
    config = _with_keep_ratio(resolve_layers(config))
    preset = chosen_preset(config, PRESETS, _PAPER)
    unused: tuple[str, ...] = ()
    if (config.score or preset.score) == "magnitude":
        unused = keys_of(GradientOptions)
        refuse_ignored(config, unused, "score magnitude needs no gradients")
    config = filled(config, preset, unused)
    if config.score_all_layers and config.schedule == "iterative":
        raise ConfigError(
            "method.score_all_layers would be ignored: schedule iterative scores each block with "
            "the blocks above it replaced; leave it unset, or use schedule one_shot"
        )
    return config


def _check_amount(config: MethodConfig) -> None:
    if config.removed_ratio is None:
        return
    check_share(config.removed_ratio)
    key = named_layers(config)
    if key is not None and config.keep_ratio is not None:
        raise ConfigError(
            f"method.removed_ratio, method.keep_ratio and {key} cannot all be set; leave one of "
            "them unset"
        )
    if key is None and config.keep_ratio is None:
        raise ConfigError(
            "method.removed_ratio also needs one of method.num_layers, method.layers and "
            "method.keep_ratio"
        )


def _with_keep_ratio(config: MethodConfig) -> MethodConfig:
    """Fill in the default, unless ``removed_ratio`` determines the ratio."""
    if config.removed_ratio is not None and config.keep_ratio is None:
        return config
    keep_ratio = DEFAULT_KEEP_RATIO if config.keep_ratio is None else config.keep_ratio
    if not 0 <= keep_ratio < 1:
        raise ConfigError(
            f"method.keep_ratio must be at least 0 and below 1, got {keep_ratio}: it is the share "
            "of each matrix's parameters that is kept"
        )
    return replace(config, keep_ratio=keep_ratio)


def _built(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    layers = configured_layers(resolve_num_layers(config, view))
    if config.keep_ratio == 0:
        return DropMethod(layers, "grasp", _REFERENCE, {"keep_ratio": 0.0})
    return Grasp(
        layers=layers,
        scoring=Scoring(**given(config, Scoring)),
        rank_rule=configured_rule(config, view),
        schedule=config.schedule or "one_shot",
        score_all_layers=bool(config.score_all_layers),
        track=track,
    )


def _obstacle(config: MethodConfig) -> str | None:
    if config.schedule == "iterative":
        return "method.schedule iterative sweeps once per block: set method.schedule=one_shot"
    return None


GRASP: Final = Registered(
    name="grasp",
    ignores="scores components of the plain SVD; see grasp_plus and low_rank",
    resolve=_resolved,
    build=_built,
    obstacle=_obstacle,
)
