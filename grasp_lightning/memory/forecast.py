"""Forecast of a calibration and a compensation from their configurations, by strategy."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, get_args

from grasp_lightning.config import (
    CompensateConfig,
    CompressConfig,
    PlanConfig,
    Strategy,
    TrainerConfig,
    TrainMode,
)
from grasp_lightning.config.compensate_settings import (
    ADAPTER_MODES,
    check_settings,
    uses_instructions,
)
from grasp_lightning.config.parsing import parse
from grasp_lightning.data.mixture import SELF, mixture_parts
from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.cut_losses import MAX_TOKENS
from grasp_lightning.memory.activations import FLOAT32, evaluation_bytes, sampling_bytes
from grasp_lightning.memory.calibration import bases_bytes, calibration_memory, update_bytes
from grasp_lightning.memory.compensation import (
    compensation_activations,
    compensation_memory,
    trained_parameters,
)
from grasp_lightning.memory.shapes import Adapters, ModelShape, Pass, Scored
from grasp_lightning.memory.streamed import streamed_memory
from grasp_lightning.memory.text import CalibrationPlan, CompensationPlan, CompensationRow
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.sensitivity import SENSITIVITY
from grasp_lightning.methods.sleb import SLEB
from grasp_lightning.methods.sparsegpt import SPARSEGPT
from grasp_lightning.models.sampling import BATCH
from grasp_lightning.reading.text import user_path
from grasp_lightning.stats.base import FORWARD_MOMENTS
from grasp_lightning.stats.moments import groups_within
from grasp_lightning.training.hidden_cache import DEFAULT_LIMIT

# Sharding is pointless in one process: the forecast then assumes this many.
DEFAULT_PROCESSES: Final = 8
_COMPENSATION_STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)
_WHOLE_STATES: Final[tuple[Strategy, ...]] = ("auto", "ddp")


def compensation_settings(config: PlanConfig) -> CompensateConfig:
    """Return the compensation to forecast: that of ``plan``'s file, or the defaults.

    Raises:
        ConfigError: If the file is missing; a wrong one is refused as ``compensate`` does.
    """
    file = config.compensate
    if file is None:
        return CompensateConfig(model=config.model)
    if not user_path(file, "--compensate", ConfigError).is_file():
        raise ConfigError(f"--compensate {file}: no such file")
    # The compressed model does not exist yet, so the file need not name it.
    argv = [f"--config={file}", f"--model.path={config.model.path}"]
    settings = parse(CompensateConfig, "plan", argv)
    check_settings(settings)
    return settings


def calibration_plan(
    config: CompressConfig,
    dense: ModelShape,
    compressed: ModelShape,
    layers: tuple[int, ...],
    *,
    moments: int = 0,
    layer_moments: int | None = None,
    set_weights: int = 0,
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
    """
    run = calibration_pass(config)
    scored = replace(scored_by(config, dense, layers), moments=moments)
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
        streamed = streamed_memory(config, dense, replaced, run, scored, moments=layer_moments)
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
    config: CompressConfig, compensate: CompensateConfig, dense: ModelShape, compressed: ModelShape
) -> CompensationPlan:
    """Return the memory of a compensation, by strategy, with and without gradient checkpointing.

    Args:
        config: Configuration of the compression.
        compensate: Configuration of the compensation.
        dense: The dense model, which is the teacher in a distillation.
        compressed: The model that is trained.
    """
    processes = _num_processes(compensate.trainer, config.trainer)
    is_8bit = compensate.optimizer.name == "adamw_8bit"
    strategies = _WHOLE_STATES if is_8bit else _COMPENSATION_STRATEGIES
    rows = {
        strategy: _compensation_row(compensate, dense, compressed, strategy, processes)
        for strategy in strategies
    }
    modes = {}
    for train in get_args(TrainMode):
        other = replace(compensate, train=train)
        if trained_parameters(compressed, adapters_of(other)):  # there may be no factors
            modes[train] = _compensation_row(other, dense, compressed, "auto", processes)
    run, adapters = compensation_pass(compensate), adapters_of(compensate)
    return CompensationPlan(
        source=config.compensate if isinstance(config, PlanConfig) else None,
        train=compensate.train,
        trained=trained_parameters(compressed, adapters),
        batch_size=run.batch_size,
        seqlen=run.seqlen,
        processes=processes,
        activations_checkpointed=_activations(compensate, compressed, is_checkpointed=True),
        rows=rows,
        modes=modes,
    )


def _compensation_row(
    config: CompensateConfig,
    dense: ModelShape,
    compressed: ModelShape,
    strategy: Strategy,
    processes: int,
) -> CompensationRow:
    adapters = adapters_of(config)
    has_teacher = config.objective == "distill" and config.distillation.device == "auto"
    (memory, host), (less, _) = (
        compensation_memory(
            compressed,
            strategy,
            1 if strategy == "auto" else processes,
            trained=trained_parameters(compressed, adapters),
            is_new=adapters.rank is not None,
            activations=_activations(config, compressed, is_checkpointed=is_checkpointed),
            teacher=dense.weights if has_teacher else 0,
            is_8bit=config.optimizer.name == "adamw_8bit",
        )
        for is_checkpointed in (False, True)
    )
    return CompensationRow(memory=memory, total_checkpointed=less.total, host=host)


def _activations(config: CompensateConfig, model: ModelShape, *, is_checkpointed: bool) -> int:
    return compensation_activations(
        model,
        compensation_pass(config),
        adapters_of(config),
        is_checkpointed=is_checkpointed,
        num_logits=1 + (config.objective == "distill"),
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
