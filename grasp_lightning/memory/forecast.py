"""Forecast of a calibration and a compensation from their configurations, by strategy."""

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Final, get_args

from grasp_lightning.config import (
    CompensateConfig,
    CompressConfig,
    Strategy,
    TrainerConfig,
    TrainMode,
)
from grasp_lightning.config.compensate_settings import (
    ADAPTER_MODES,
    uses_instructions,
    uses_self,
)
from grasp_lightning.data.mixture import SELF, mixture_parts, section_of
from grasp_lightning.evaluation.cut_losses import MAX_TOKENS
from grasp_lightning.memory.activations import FLOAT32, HALF, evaluation_bytes, sampling_bytes
from grasp_lightning.memory.calibration import bases_bytes, calibration_memory, update_bytes
from grasp_lightning.memory.compensation import (
    compensation_activations,
    compensation_memory,
    trained_parameters,
)
from grasp_lightning.memory.local import hidden_state_bytes, local_memory
from grasp_lightning.memory.shapes import Adapters, ModelShape, Pass, Scored
from grasp_lightning.memory.streamed import streamed_memory
from grasp_lightning.memory.text import (
    CachedPredictions,
    CalibrationPlan,
    CompensationPlan,
    CompensationRow,
)
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.sensitivity import SENSITIVITY
from grasp_lightning.methods.sleb import SLEB
from grasp_lightning.methods.sparsegpt import SPARSEGPT
from grasp_lightning.models.next_token import stored_bytes
from grasp_lightning.models.sampling import BATCH
from grasp_lightning.stats.base import FORWARD_MOMENTS
from grasp_lightning.stats.moments import groups_within
from grasp_lightning.training.hidden_cache import DEFAULT_LIMIT

# Sharding is pointless in one process: the forecast then assumes this many.
DEFAULT_PROCESSES: Final = 8
_COMPENSATION_STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)
_ITEM_SIZES: Final = MappingProxyType({"float32": FLOAT32, "bfloat16": HALF, "float16": HALF})
_WHOLE_STATES: Final[tuple[Strategy, ...]] = ("auto", "ddp")


def calibration_plan(
    config: CompressConfig,
    dense: ModelShape,
    compressed: ModelShape,
    layers: tuple[int, ...],
    *,
    moments: int = 0,
    layer_moments: int | None = None,
    set_weights: int = 0,
    row_groups: tuple[tuple[int, int], ...] = (),
    device_memory: float | None = None,
) -> CalibrationPlan:
    """Return the memory of a calibration, by strategy.

    Args:
        config: Configuration with its method resolved.
        dense: The model before compression.
        compressed: The model after it.
        layers: Layers that are replaced.
        moments: Bytes of the Gram matrices that one pass sums.
        layer_moments: The same for a single layer; None if the method cannot be streamed.
        set_weights: Number of weights that are replaced by others of equal shape.
        row_groups: Groups of rows of embedding and head that are priced, ``(V_g, D)`` each.
        device_memory: Memory of the device in GB, for which the way to load is chosen.
    """
    run = calibration_pass(config)
    scored = replace(scored_by(config, dense, layers), moments=moments, rows=row_groups)
    if config.method.name == SPARSEGPT.name:
        linears = [x for i in layers for x in dense.layers[i].linears.values()]
        scored = replace(scored, update=max(map(update_bytes, linears)))
    replaced = [linear for layer in compressed.layers for linear in layer.linears.values()]
    processes = _num_processes(config.trainer)
    rows = {}
    for label, num_parts, sharing in (
        ("auto", 1, 1),
        (f"ddp, {processes} processes", 1, processes),
        (f"fsdp, {processes} processes", processes, processes),
    ):
        changes_whole = scored.trained > 0 or config.method.directions_of is not None
        if changes_whole and num_parts > 1:  # not supported
            continue
        cache = _cache_bytes(config, dense, layers, sharing)
        rows[label] = calibration_memory(
            dense,
            replaced,
            run,
            scored,
            num_parts=num_parts,
            cache=cache,
            set_weights=set_weights * dense.element_size,
        )
    streamed = None
    if layer_moments is not None:
        streamed = streamed_memory(
            config,
            dense,
            replaced,
            run,
            scored,
            moments=layer_moments,
            written=compressed.parameters,
        )
    evaluated = Pass(batch_size=config.evaluation.batch_size, seqlen=config.evaluation.seqlen)
    parts = mixture_parts(config.calibration, "calibration")
    num_written = sum(part.num_samples for part in parts if part.source == SELF)
    written = replace(run, batch_size=min(num_written, BATCH))
    return CalibrationPlan(
        batch_size=run.batch_size,
        seqlen=run.seqlen,
        lowest=scored.lowest,
        trains_layer=scored.trained > 0,
        rows=rows,
        evaluation_tokens=evaluated.num_tokens,
        evaluation=dense.weights + evaluation_bytes(dense, evaluated),
        sampled_texts=written.batch_size,
        sampling=dense.weights + sampling_bytes(dense, written),
        streamed=streamed,
        num_processes=config.trainer.devices * config.trainer.num_nodes,
        device_bytes=None if device_memory is None else int(device_memory * 1e9),
    )


def calibration_pass(config: CompressConfig) -> Pass:
    """Return the windows of one forward pass of calibration."""
    return Pass(
        batch_size=config.calibration.batch_size,
        seqlen=config.calibration.seqlen,
        is_mixed=config.trainer.precision == "bf16-mixed",
    )


def scored_by(config: CompressConfig, dense: ModelShape, layers: tuple[int, ...]) -> Scored:
    """Return what the most expensive calibration pass scores: nothing where layers are dropped.

    Args:
        config: Configuration with its method resolved.
        layers: Layers that are replaced.
    """
    method = config.method
    if method.criterion not in (None, "perplexity") or method.importance not in (None, "l2"):
        # A criterion scores all layers.
        scored = layers if method.criterion is None else tuple(range(len(dense.layers)))
        return _layer_gradients(config, dense, scored)
    if method.name == SLEB or method.criterion == "perplexity":
        return Scored(linears=(), lowest=None, num_layers=0, has_logits=True)
    if method.replacement is not None:
        trained = max(layer.parameters for layer in dense.layers)
        return Scored(linears=(), lowest=None, num_layers=0, trained=trained)
    if (method.score is None and method.weighting is None) or method.keep_ratio == 0:
        return Scored(linears=(), lowest=None, num_layers=0)
    positions = layers
    if method.score_all_layers:  # as many other layers at a time
        positions = tuple(range(min(len(dense.layers), 2 * len(layers))))
    if method.schedule == "iterative":
        linears = max((b for i in positions for b in dense.layers[i].blocks), key=bases_bytes)
        num_layers = 1
    else:
        linears = tuple(x for i in positions for x in dense.layers[i].linears.values())
        num_layers = len(positions)
    if method.weighting is not None:
        kinds = Metric(weighting=method.weighting).moment_kinds
        has_pass = not kinds <= FORWARD_MOMENTS
    else:
        has_pass = method.score != "magnitude"
    is_full = method.terms != "sigma"
    return Scored(
        linears=linears,
        lowest=min(positions) if has_pass else None,
        num_layers=num_layers,
        sums_gradients=is_full and method.reduction == "signed",
        is_full=is_full,
        has_bases=method.weighting is None,
        has_logits=method.ranks == SENSITIVITY,
    )


def _layer_gradients(config: CompressConfig, model: ModelShape, layers: Iterable[int]) -> Scored:
    """Return the largest pass over some layers: it sums the gradients of as many as fit."""
    num_sums = 2 if config.method.importance == "taylor_mixed" else 1
    max_bytes = config.statistics.max_memory * 1e9
    sizes = {index: num_sums * FLOAT32 * model.layers[index].parameters for index in layers}
    groups = groups_within(sizes, max_bytes)
    largest = max(groups, key=lambda group: sum(sizes[index] for index in group))
    return Scored(
        linears=tuple(x for index in largest for x in model.layers[index].linears.values()),
        lowest=min(groups[0]),
        num_layers=len(largest),
        sums_gradients=True,
        num_sums=num_sums,
        is_full=False,
        has_bases=False,
    )


def compensation_plan(
    compensate: CompensateConfig,
    dense: ModelShape,
    compressed: ModelShape,
    *,
    source: str | None = None,
    trainers: Iterable[TrainerConfig] = (),
) -> CompensationPlan:
    """Return the memory of a compensation, by strategy, with and without gradient checkpointing.

    Args:
        compensate: Configuration of the compensation.
        dense: The dense model, which is the teacher in a distillation.
        compressed: The model that is trained.
        source: Name of the configuration file.
        trainers: Other settings that may say how many processes there are.
    """
    processes = _num_processes(compensate.trainer, *trainers)
    is_local = compensate.objective == "local"
    is_whole = compensate.optimizer.name == "adamw_8bit" or is_local
    strategies = _WHOLE_STATES if is_whole else _COMPENSATION_STRATEGIES
    rows = {
        strategy: _compensation_row(compensate, dense, compressed, strategy, processes)
        for strategy in strategies
    }
    modes = {}
    for train in get_args(TrainMode):
        if is_local and train in ADAPTER_MODES:
            continue
        other = replace(compensate, train=train)
        if trained_parameters(compressed, adapters_of(other)):  # there may be no factors
            modes[train] = _compensation_row(other, dense, compressed, "auto", processes)
    run, adapters = compensation_pass(compensate), adapters_of(compensate)
    return CompensationPlan(
        source=source,
        train=compensate.train,
        trained=trained_parameters(compressed, adapters),
        batch_size=run.batch_size,
        seqlen=run.seqlen,
        processes=processes,
        hidden_states=hidden_state_bytes(compensate, dense, compressed, 1) if is_local else None,
        activations_checkpointed=_activations(
            compensate, _as_loaded(compensate, compressed), is_checkpointed=True
        ),
        rows=rows,
        modes=modes,
        cached=cached_predictions(compensate, dense.vocabulary),
    )


def _compensation_row(
    config: CompensateConfig,
    dense: ModelShape,
    compressed: ModelShape,
    strategy: Strategy,
    processes: int,
) -> CompensationRow:
    adapters, num_processes = adapters_of(config), 1 if strategy == "auto" else processes
    if config.objective == "local":
        run = compensation_pass(config)
        memory = local_memory(config, dense, compressed, run, adapters, num_processes=num_processes)
        return CompensationRow(memory=memory, total_checkpointed=memory.total, host=0)
    dense, compressed = _as_loaded(config, dense), _as_loaded(config, compressed)
    has_teacher = config.objective == "distill" and config.distillation.device == "auto"
    has_teacher = has_teacher and not config.distillation.cache
    (memory, host), (less, _) = (
        compensation_memory(
            compressed,
            strategy,
            num_processes,
            trained=trained_parameters(compressed, adapters),
            is_new=adapters.rank is not None,
            activations=_activations(config, compressed, is_checkpointed=is_checkpointed),
            teacher=dense.weights if has_teacher else 0,
            is_8bit=config.optimizer.name == "adamw_8bit",
        )
        for is_checkpointed in (False, True)
    )
    before = _bytes_before_training(config, dense)
    if before and strategy in _WHOLE_STATES:  # else the trained model is still on the host
        before += compressed.weights
    return CompensationRow(
        memory=memory, total_checkpointed=less.total, host=host, before_training=before
    )


def _as_loaded(config: CompensateConfig, model: ModelShape) -> ModelShape:
    """Return a shape with the dtype that a compensation loads; trained weights are float32."""
    size = _ITEM_SIZES.get(config.model.dtype, model.element_size)
    return replace(model, element_size=size if config.train in ADAPTER_MODES else FLOAT32)


def _bytes_before_training(config: CompensateConfig, dense: ModelShape) -> int:
    """Return what a dense model takes that is released before training: it writes or is cached."""
    if config.distillation.device != "auto":
        return 0
    run, work = compensation_pass(config), []
    if config.objective == "distill" and config.distillation.cache:
        work.append(evaluation_bytes(dense, run))
    if uses_self(config):
        parts = mixture_parts(section_of(config.text), "text")
        num_written = sum(part.num_samples for part in parts if part.source == SELF)
        work.append(sampling_bytes(dense, replace(run, batch_size=min(num_written, BATCH))))
    return dense.weights + max(work) if work else 0


def cached_predictions(config: CompensateConfig, vocabulary: int) -> CachedPredictions | None:
    """Return the bytes of a teacher's cache on disk; None without one.

    Windows of text have one prediction per token but the first. How many tokens instructions have
    is not known before they are read.
    """
    if config.objective != "distill" or not config.distillation.cache:
        return None
    per_token, text = stored_bytes(config.distillation.top_k, vocabulary), config.text
    num_tokens = (text.num_samples + text.num_validation) * (text.seqlen - 1)
    return CachedPredictions(per_token, None if uses_instructions(config) else num_tokens)


def _activations(config: CompensateConfig, model: ModelShape, *, is_checkpointed: bool) -> int:
    return compensation_activations(
        model,
        compensation_pass(config),
        adapters_of(config),
        is_checkpointed=is_checkpointed,
        num_logits=1 + (config.objective == "distill" and not config.distillation.cache),
    )


def adapters_of(config: CompensateConfig) -> Adapters:
    """Return the adapters or weights that a configuration trains."""
    return Adapters(
        rank=config.lora.rank if config.train in ADAPTER_MODES else None,
        on_dense=config.train in {"lora", "all"},
        has_rewritten=config.train == "replaced",
        has_dropout=config.lora.dropout > 0,
        targets=config.lora.targets if config.train in ADAPTER_MODES else (),
    )


def compensation_pass(config: CompensateConfig) -> Pass:
    """Return the rows of one forward pass of compensation, at full length."""
    reads_instructions = uses_instructions(config)
    return Pass(
        batch_size=config.training.micro_batch_size,
        seqlen=config.data.max_length if reads_instructions else config.text.seqlen,
        is_mixed=config.trainer.precision == "bf16-mixed",
        is_padded=reads_instructions,
        on_cpu="cpu" in (config.model.device, config.trainer.accelerator),
    )


def _cache_bytes(
    config: CompressConfig, model: ModelShape, layers: tuple[int, ...], processes: int
) -> int:
    """Return the size of ``HiddenCache``: the inputs of as many replaced layers as fit.

    A search for layers keeps those of all candidates, for one batch; a search for ranks those of
    all layers, for its windows. A trained layer needs the hidden states around its span, and
    slicing those of one layer, up to the limit of the statistics. Pruning layer by layer keeps the
    inputs of two layers, or none if one of them does not fit.
    """
    if config.method.merge is not None:
        return _trial_bytes(config, model, processes)
    if config.method.ranks == SENSITIVITY:  # every process has all windows
        return _tried_inputs(config, model, 1)
    if config.method.name == SLEB:
        batch = config.calibration.batch_size * config.calibration.seqlen
        layer = batch * model.hidden * model.element_size
        return min(len(model.layers) - 2, DEFAULT_LIMIT // layer) * layer
    windows = -(-config.calibration.num_samples // processes)
    layer = windows * config.calibration.seqlen * model.hidden * model.element_size
    return _kept_between_layers(config, layer, len(layers))


def _kept_between_layers(config: CompressConfig, layer: int, num_layers: int) -> int:
    """Return the bytes of hidden states that a method keeps, from those of one layer."""
    method, most = config.method, int(config.statistics.max_memory * 1e9)
    if method.replacement is not None:
        return min(2 * layer, most)
    if method.directions_of is not None:
        return min(layer, most)
    if method.pattern is not None:
        return 2 * layer if layer <= DEFAULT_LIMIT else 0
    if method.schedule != "iterative" or method.score == "magnitude":
        return 0
    return min(num_layers, DEFAULT_LIMIT // layer) * layer


def _trial_bytes(config: CompressConfig, model: ModelShape, processes: int) -> int:
    """Return what a tried merge keeps: inputs of all layers, final states, and one layer twice."""
    weights = 2 * max(entry.parameters for entry in model.layers) * model.element_size
    layer = _layer_inputs(config, model, processes)
    return _tried_inputs(config, model, processes) + layer + weights


def _tried_inputs(config: CompressConfig, model: ModelShape, processes: int) -> int:
    """Return the inputs of all layers on the windows of a search, as many as fit."""
    layer = _layer_inputs(config, model, processes)
    return min(len(model.layers), DEFAULT_LIMIT // layer) * layer


def _layer_inputs(config: CompressConfig, model: ModelShape, processes: int) -> int:
    """Return the inputs of one layer on the windows of a search."""
    windows = -(-config.statistics.priced_windows // processes)
    tokens = windows * min(config.calibration.seqlen, MAX_TOKENS)
    return tokens * model.hidden * model.element_size


def _num_processes(*trainers: TrainerConfig) -> int:
    """Return the number of the first trainer that has several processes."""
    numbers = (trainer.devices * trainer.num_nodes for trainer in trainers)
    return next((number for number in numbers if number > 1), DEFAULT_PROCESSES)
