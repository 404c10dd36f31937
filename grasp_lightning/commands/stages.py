"""The stages of ``compress`` and ``compensate``, and their work, for the bar of a run.

Work is counted in forward passes of one token through the model. A rough number is
enough: with the measured speed of earlier stages it gives the time of later ones.
"""

from collections.abc import Collection, Mapping

from grasp_lightning.config import CompensateConfig, CompressConfig
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.mixture import SELF
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.cut_losses import MAX_TOKENS
from grasp_lightning.methods.attribution import ATTRIBUTION
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.methods.flap import NAME as FLAP
from grasp_lightning.methods.laco import MERGE
from grasp_lightning.methods.layer_choice import GRADIENTS, SELECT
from grasp_lightning.methods.llm_streamline import TRAIN_LAYER
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.methods.removal import REMOVALS
from grasp_lightning.methods.seams import SEAM
from grasp_lightning.methods.sensitivity import KEEP_RATIOS, SENSITIVITY
from grasp_lightning.methods.sleb import SLEB
from grasp_lightning.methods.slicegpt import SLICE
from grasp_lightning.methods.sparsegpt import SPARSEGPT
from grasp_lightning.methods.truncation import CURVATURE
from grasp_lightning.methods.unit_removal import SPREAD, removable_units
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import weights_of
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import NarrowExperts, Plan, Replacement
from grasp_lightning.progress import Stage, Work
from grasp_lightning.stats.layer_gradients import gradient_groups
from grasp_lightning.stats.unit_gradients import unit_groups
from grasp_lightning.storage.model_folder import VERIFY
from grasp_lightning.storage.sampled_text import SAMPLE
from grasp_lightning.storage.teacher_cache import TEACHER
from grasp_lightning.training.finish import CUT_LOSSES, REFIT

LOAD, EVALUATE, FACTORIZE, TRAIN, SAVE = "load", "evaluate", "factorize", "train", "save"
PHASE_OF_STEP = {
    SELECT: "similarity",
    ATTRIBUTION: "attribution",
    CURVATURE: "curvature",
    MERGE: "merges",
    REMOVALS: "removals",
    TRAIN_LAYER: TRAIN_LAYER,
    SEAM: "seam",
    SLICE: "slice",
    GRADIENTS: "gradients",
    SPREAD: "spread",
    SENSITIVITY: "truncations",
}

# Forward passes per token, from the CPU time of a run on SmolLM2-135M with one thread.
_FORWARD_AND_BACKWARD = 3.0
_CURVATURE = 3.3
_PRUNING = 3.0
_SEAM = 1.1
_SLICE = 4.0
_REFIT = 2.5
_DECOMPOSITION = 65.0  # multiplications of a forward pass, per N x M x min(N, M)
_UPDATES = 20  # updates of weights in the time of a decomposition
_PASSES_OF_BUDGET = 4  # losses, order of channels, factors, narrowed MLPs
_SAVING = (
    Stage(phase=SAVE, label="save", like=LOAD),
    Stage(phase=VERIFY, label="verify", like=LOAD),
)


def compress_stages(config: CompressConfig) -> list[Stage]:
    """Return the stages of a compression, whose method is resolved, in order."""
    method, sources = config.method, config.calibration.source
    writes_text = SELF in ((sources,) if isinstance(sources, str) else sources)
    prunes, searches_ranks = method.pattern is not None, method.ranks == SENSITIVITY
    has_curvature = method.weighting not in (None, "none") and not searches_ranks
    is_scored = method.score is not None and method.keep_ratio != 0
    measures_cuts = method.weighting == "kfac" and config.statistics.measured_windows > 0
    has_gradients = method.criterion not in (None, "perplexity") or _scores_units(config)
    prices_blocks = method.unit in ("attention", "mlp") and method.layers is None
    choose = Stage(phase=FACTORIZE, label="prune" if prunes else "decompose")
    if method.ranks in ("per_type", "global"):
        choose = Stage(phase=FACTORIZE, label="choose ranks", passes=_PASSES_OF_BUDGET)
    stages = {
        Stage(phase=LOAD, label="load model and text"): True,
        Stage(phase=SAMPLE, label="generate text"): writes_text and config.from_scores is None,
        Stage(phase=EVALUATE, label="perplexity before"): True,
        Stage(phase="similarity", label="compare layers"): method.layer_metric is not None,
        Stage(phase="gradients", label="score by gradients"): has_gradients,
        Stage(phase="spread", label="measure inputs"): method.name == FLAP,
        Stage(phase="curvature", label="measure curvature"): has_curvature,
        Stage(phase="curvature", label="measure inputs"): prunes,
        Stage(phase="truncations", label="try truncations"): searches_ranks,
        Stage(phase="merges", label="try merges"): method.merge is not None,
        Stage(phase="removals", label="search layers"): method.name == SLEB,
        Stage(phase="removals", label="measure layers"): method.criterion == "perplexity",
        Stage(phase="removals", label="measure blocks"): prices_blocks,
        Stage(phase=TRAIN_LAYER, label="train a layer", passes=2): method.replacement is not None,
        Stage(phase="seam", label="compare hidden states"): method.ridge is not None,
        Stage(phase="slice", label="rotate hidden states"): method.directions_of is not None,
        choose: method.weighting is not None or is_scored or prunes,
        Stage(phase="attribution", label="score components"): is_scored
        and method.score != "magnitude",
        Stage(phase=CUT_LOSSES, label="measure cuts"): measures_cuts,
        Stage(phase=REFIT, label="refit"): method.refit not in (None, "none"),
        Stage(phase=EVALUATE, label="perplexity after"): True,
    }
    return [*(stage for stage, is_there in stages.items() if is_there), *_SAVING]


def compress_work(
    config: CompressConfig,
    view: DecoderView,
    prediction: Prediction,
    held_out: TokenWindows,
    plan: Plan,
) -> dict[str, Work]:
    """Return the work of each phase.

    Args:
        config: Configuration with its method resolved.
        view: The dense model.
        held_out: Windows of the perplexity.
        plan: What an earlier start has already done.
    """
    method, settings = config.method, config.calibration
    tokens = settings.num_samples * settings.seqlen
    decomposed = 0
    if method.name == SPARSEGPT.name:
        decomposed = sum(m * m * (n + m) for n, m in _shapes(view, prediction)) // _UPDATES
    if method.weighting is not None or method.score is not None:
        decomposed = sum(n * m * min(n, m) for n, m in _shapes(view, prediction))
        decomposed += _of_experts(view, prediction)
    cuts = sum(isinstance(op, Replacement) for op in prediction.operations)
    measured = min(held_out.input_ids.shape[1], MAX_TOKENS) * config.statistics.measured_windows
    tried = min(settings.seqlen, MAX_TOKENS) * config.statistics.priced_windows
    groups = 1
    if method.score_all_layers:
        groups = -(-view.num_layers // max(len(prediction.layers), 1))
    attribution = Work(_FORWARD_AND_BACKWARD * tokens * groups, groups)
    if method.schedule == "iterative":
        # Each block has a decomposition and a pass, half as deep on average.
        blocks = 2 * len(prediction.layers)
        left = 1 - len(plan.operations) / max(len(prediction.operations), 1)
        attribution = Work(attribution.amount * blocks / 2, max(round(2 * blocks * left), 1))
    limit = config.statistics.max_memory * 1e9
    passes = len(gradient_groups(view, view.layer_indices, limit))
    if method.importance is not None and _scores_units(config):
        units = removable_units(view, prediction.layers, method.name)
        passes = len(unit_groups(view, units, method.importance, limit))
    measuring = {
        "similarity": Work(tokens),
        "removals": _removal_work(config, view, prediction, plan),
        "curvature": _curvature_work(config, view, prediction, plan),
        "seam": Work(_SEAM * tokens),
        "spread": Work(_SEAM * tokens),
        "slice": Work(_SLICE * tokens),
        "gradients": Work(_FORWARD_AND_BACKWARD * tokens * passes, passes),
        "attribution": attribution,
        "truncations": _search_work(config, view, prediction),
        # About one sweep, half as deep on average.
        "merges": Work(view.num_layers / 2 * tried, view.num_layers),
    }
    if config.from_scores is not None:  # it reads what an earlier run has measured
        measuring = dict.fromkeys(measuring, Work(0))
    return {
        **measuring,
        EVALUATE: Work(held_out.num_tokens),
        FACTORIZE: Work(_DECOMPOSITION * decomposed / (2 * count_parameters(view.model))),
        TRAIN_LAYER: Work(_layer_training(config, view) * tokens, 2),
        CUT_LOSSES: Work(cuts * measured),
        REFIT: Work(_REFIT * tokens),
    }


def _curvature_work(
    config: CompressConfig, view: DecoderView, prediction: Prediction, plan: Plan
) -> Work:
    """Return the work of one pass over all layers, or of one pass for each layer to prune."""
    tokens = config.calibration.num_samples * config.calibration.seqlen
    if config.method.pattern is None:
        return Work(_CURVATURE * tokens * (2 if config.method.embeddings == "factors" else 1))
    done = {view.layer_of(module) for op in plan.operations for module in op.linears}
    left = len(prediction.layers) - len(done)
    # After the first pass, two layers run in each: the one pruned last, and the measured one.
    return Work(_PRUNING * tokens * left / view.num_layers, max(left, 1))


def _shapes(view: DecoderView, prediction: Prediction) -> Collection[tuple[int, int]]:
    return weight_shapes(view, Plan(method="stages"), prediction.layers).values()


def _of_experts(view: DecoderView, prediction: Prediction) -> int:
    """Return the work of narrowing experts, in the unit of a decomposition."""
    narrowed = [op.experts for op in prediction.operations if isinstance(op, NarrowExperts)]
    weights = weights_of(view, narrowed) if narrowed else {}
    return sum(e * n * m * min(n, m) for e, n, m in (w.shape for w in weights.values()))


def _scores_units(config: CompressConfig) -> bool:
    return config.method.importance not in (None, "l2")


def _removal_work(
    config: CompressConfig, view: DecoderView, prediction: Prediction, plan: Plan
) -> Work:
    """Return the work of running the model without each layer; half of it runs again on average.

    A search does so in every step, on all windows; shortened_llama once.
    """
    settings = config.calibration
    tokens = settings.num_samples * settings.seqlen
    if config.method.criterion == "perplexity":
        return Work(tokens * (1 + view.num_layers / 2))
    if config.method.name != SLEB:
        num_windows = min(config.statistics.priced_windows, settings.num_samples)
        priced = min(settings.seqlen, MAX_TOKENS) * num_windows
        return Work(priced * (1 + view.num_layers / 2), num_windows)
    steps = range(len(plan.dropped_layers), prediction.num_layers)
    forwards = sum(1 + (view.num_layers - gone - 2) / 2 for gone in steps)
    return Work(forwards * tokens, max(len(steps), 1))


def _search_work(config: CompressConfig, view: DecoderView, prediction: Prediction) -> Work:
    """Return the work of a search for ranks: a forward pass, and half of one per truncation."""
    if config.method.ranks != SENSITIVITY:
        return Work(0)
    settings, limited = config.calibration, config.method.search_minutes is not None
    num_windows = min(config.statistics.priced_windows, settings.num_samples)
    tried = min(settings.seqlen, MAX_TOKENS) * num_windows
    trials = len(KEEP_RATIOS) * len(weight_shapes(view, Plan(method="stages"), prediction.layers))
    return Work(settings.num_samples * settings.seqlen + tried * trials / 2, 2 + limited)


def _layer_training(config: CompressConfig, view: DecoderView) -> float:
    """Return the forward passes per token that the training of one layer takes."""
    if config.method.replacement is None:
        return 0.0
    return 1 + _FORWARD_AND_BACKWARD * (config.method.epochs or 0) / view.num_layers


def compensate_stages(*, is_split: bool, writes_text: bool, is_cached: bool) -> list[Stage]:
    """Return the stages of a compensation; a split model is measured while it is trained.

    Args:
        writes_text: Whether the dense model generates text.
        is_cached: Whether a teacher's predictions are kept on disk.
    """
    before, after = (Stage(phase=EVALUATE, label=f"perplexity {w}") for w in ("before", "after"))
    training = [Stage(phase=TRAIN, label="train")]
    load = [Stage(phase=LOAD, label="load model and text")]
    if writes_text:
        load.append(Stage(phase=SAMPLE, label="generate text"))
    if is_cached:
        load.append(Stage(phase=TEACHER, label="cache the teacher"))
    return [*load, *(training if is_split else [before, *training, after]), *_SAVING]


def compensate_work(
    config: CompensateConfig, data: TrainingData, held_out: TokenWindows, num_stages: int
) -> Mapping[str, Work]:
    """Return the work of each phase.

    Args:
        num_stages: Number of stages of a layer-local training; 0 for any other.
    """
    steps, samples, validate_every = data.steps(), data.samples, config.training.validate_every
    per_token = _FORWARD_AND_BACKWARD + config.training.gradient_checkpointing
    teaches = config.objective == "distill" and not config.distillation.cache
    per_token += teaches
    trained = samples.train.num_tokens * len(steps) / steps.steps_per_epoch
    validated = len(samples.validation) > 0
    validation = samples.validation.num_tokens * (1 + (teaches or num_stages > 0))
    whole = samples.train.num_tokens + samples.validation.num_tokens
    validations = 0 if validate_every is None else len(steps) // validate_every
    return {
        TEACHER: Work(whole),
        EVALUATE: Work(held_out.num_tokens + validation, 1 + validated),
        # Layer by layer, both models also run once, to move the hidden states.
        TRAIN: Work(
            per_token * trained + validations * validation + 2 * whole * (num_stages > 0),
            max(num_stages, 1),
        ),
    }
