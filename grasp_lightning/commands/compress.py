"""``compress``: from a configuration to a run folder with a smaller model."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Final

from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.callbacks.streamed import StreamedMeasure
from grasp_lightning.commands.inputs import Inputs, prepare
from grasp_lightning.commands.outputs import Outcome, write_outputs
from grasp_lightning.commands.plan import planned
from grasp_lightning.commands.stages import (
    EVALUATE,
    FACTORIZE,
    LOAD,
    PHASE_OF_STEP,
    compress_stages,
    compress_work,
)
from grasp_lightning.commands.streamed import check_streamed
from grasp_lightning.commands.vocabulary import check_vocabulary_keys
from grasp_lightning.commands.workflow import output_folder, run_in_folder, tracked_perplexity
from grasp_lightning.config import CompressConfig, MethodConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods import resolve_method
from grasp_lightning.methods.base import Decision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.in_memory import ModelInMemory
from grasp_lightning.models.loading import LoadedModel, load_model, model_hash
from grasp_lightning.models.plain import make_plain
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.models.size import ModelSize, count_inputs, measure_size
from grasp_lightning.models.source import resolve_source
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.pipeline import Finish, Measure, compress
from grasp_lightning.plan import OptionValue, Plan
from grasp_lightning.progress import RunBar, expect_work, track
from grasp_lightning.reporting.metrics import Metrics, Pair
from grasp_lightning.run_folder import RunFolder, check_free_space
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.storage.progress import RunProgress
from grasp_lightning.storage.shared import Facts, check_shared_folder
from grasp_lightning.storage.shared_statistics import SharedMeasure
from grasp_lightning.training.finish import CUT_LOSSES, REFIT, FinishDecision
from grasp_lightning.training.hidden_cache import pass_on_hidden_states_only
from grasp_lightning.training.sweep import sweep_perplexity

# Keys that change no statistic.
_WITHOUT_EFFECT: Final = {
    "statistics": {"max_memory", "store", "measured_windows", "shared"},
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "checkpoint_seconds"},
}
_MEMORY_KEYS = "calibration.batch_size, calibration.seqlen or evaluation.batch_size"


@dataclass(frozen=True, kw_only=True)
class CompressRun:
    """A finished run, with its folder as the user named it."""

    folder: Path
    metrics: Metrics


def run_compress(config: CompressConfig, given: ModelInMemory | None = None) -> CompressRun:
    """Compress a model as a configuration says, and write its run folder.

    With a ``given`` model, a copy of it is compressed, and ``config`` has its settings.

    The metrics of a finished run are only read; an unfinished run resumes. SIGINT and SIGTERM save
    at the next batch and raise ``Interrupted``. A wrong configuration, model, corpus or number is a
    ``GraspError``, which leaves nothing of a new run.

    Raises:
        ConfigError: If ``dry_run`` or ``compensate`` is set.
    """
    if config.dry_run:
        raise ConfigError("dry_run is set: use dry_run_compress, or leave it out to make a run")
    if config.compensate is not None:
        raise ConfigError("compensate is set: use run_two_stages, or leave it out")
    config, protected = resolved(config, given)
    assert config.output_dir is not None  # resolved has checked it
    with RunBar(compress_stages(config), is_shown=processes.is_first()) as bar:
        phases = Phases(bar.follow)
        metrics = run_in_folder(
            config,
            protected=protected,
            memory_advice=_MEMORY_KEYS,
            prepare=lambda run: prepare(config, phases, run, given),
            execute=lambda run, inputs, stop: _execute(config, run, inputs, phases, stop),
            read=Metrics.from_dict,
        )
    return CompressRun(folder=Path(config.output_dir), metrics=metrics)


def resolved(
    config: CompressConfig, given: ModelInMemory | None = None
) -> tuple[CompressConfig, list[Path]]:
    """Return a configuration with its method resolved, and the folders that a run must not touch.

    Raises:
        ConfigError: If ``output_dir`` is missing, or is what another key names.
    """
    output_dir = output_folder(config, "runs/first")
    if config.from_scores is not None:
        folders = [Path(path).expanduser().resolve() for path in (output_dir, config.from_scores)]
        if folders[0] == folders[1]:
            raise ConfigError(
                f"from_scores: {config.from_scores} is also output_dir; use another output_dir"
            )
    if config.statistics.shared is not None:
        check_shared_folder(config.statistics.shared, output_dir)
    config = replace(config, method=_resolved_method(config))
    with _from_stored(config):
        check_vocabulary_keys(config, is_given=given is not None)
    if config.trainer.strategy == "fsdp":
        _check_splittable(config.method)
    if config.model.loading == "streamed":
        if given is not None:
            raise ConfigError(
                "model.loading is streamed, but the model is already in memory: give its path"
            )
        check_streamed(config)
    source = resolve_source(config.model) if given is None else given.origin
    return config, [] if source.folder is None else [source.folder]


def _resolved_method(config: CompressConfig) -> MethodConfig:
    with _from_stored(config):
        return resolve_method(config.method, config.seed)


@contextmanager
def _from_stored(config: CompressConfig) -> Iterator[None]:
    """Say of keys that contradict each other where those come from that are not set."""
    try:
        yield
    except ConfigError as error:
        if config.from_scores is None:
            raise
        raise ConfigError(
            f"{error} (keys that are not set here come from {config.from_scores}; =null unsets one)"
        ) from error


def _execute(
    config: CompressConfig, run: RunFolder, inputs: Inputs, phases: Phases, stop: StopRequest
) -> Metrics:
    inputs.text.keep_in(run)
    processes.on_first(lambda: _check_disk(config, run, inputs))
    view, method = inputs.view, inputs.method
    weights = streamed_weights(inputs.loaded.model)
    progress = RunProgress(
        run,
        Plan(method=method.name, options=_options(config, inputs), inputs=inputs.hashes),
        on_disk=weights is not None,
    )
    prediction = method.predict(view)
    expect_work(compress_work(config, view, prediction, inputs.held_out, progress.plan))
    dense_size, num_inputs = _dense_size(inputs), count_inputs(view)
    dense_perplexity = progress.noted("dense_perplexity")
    if dense_perplexity is None:
        dense_perplexity = _perplexity(config, inputs, phases, "dense")
        progress.note("dense_perplexity", dense_perplexity)
    apply_operations(view, progress.plan.operations, progress.factors)

    def add_step(plan: Plan, decision: Decision) -> None:
        progress.add_step(plan, decision)
        if weights is not None:
            weights.use(progress.factors)

    with TemporaryDirectory() as logs:
        measure = _timed(_measure(config, inputs, Path(logs), progress, stop), phases)
        with phases(FACTORIZE, excluding=(*PHASE_OF_STEP.values(), CUT_LOSSES, REFIT)):
            finish = _finish(config, inputs, phases, progress)
            plan = compress(view, method, measure, progress.plan, add_step, finish=finish)
        with run.new_folder("logs") as folder:
            shutil.copytree(logs, folder, dirs_exist_ok=True)
    sizes = Pair(dense=dense_size, compressed=measure_size(view))
    perplexity = Pair[float | None](
        dense=dense_perplexity, compressed=_perplexity(config, inputs, phases, "compressed")
    )

    def write() -> Metrics:
        with phases(LOAD):
            loaded = _compressed(config, inputs, plan, progress.factors)
            if streamed_weights(loaded.model) is None:
                make_plain(loaded.model)  # now, for the card
        outcome = Outcome(
            loaded=loaded,
            plan=plan,
            scores=progress.scores,
            factors=progress.factors,
            num_inputs=num_inputs,
            sizes=sizes,
            perplexity=perplexity,
            perplexity_tokens=inputs.held_out.num_targets,
            settings=to_dict(config),
            generates=inputs.generates,
            trim=inputs.trim,
        )
        return write_outputs(run, outcome, phases, progress.shards)

    metrics = processes.on_first(write)
    progress.clear()
    if not config.statistics.store:
        progress.forget_moments()
    run.finish()
    return metrics


def _options(config: CompressConfig, inputs: Inputs) -> dict[str, OptionValue]:
    """Return the options for the plan; a share is of the model before its vocabulary is trimmed."""
    options = dict(inputs.method.options)
    if inputs.trim is None:
        return options
    if "removed_ratio" in options:
        options["removed_ratio"] = config.method.removed_ratio
    return {**options, "vocabulary": config.method.vocabulary}


def _dense_size(inputs: Inputs) -> ModelSize:
    """Return the size of the model before anything was removed."""
    size = measure_size(inputs.view)
    if inputs.trim is None:
        return size
    before, after = inputs.trim.parameters.values
    removed = (before - after) * inputs.loaded.model.dtype.itemsize
    return replace(size, parameters=before, bytes=size.bytes + removed)


def _check_disk(config: CompressConfig, run: RunFolder, inputs: Inputs) -> None:
    """Refuse a disk with too little room for what the run writes: an ``OutputError``."""
    needed = inputs.bytes_needed
    if streamed_weights(inputs.loaded.model) is not None:
        streamed = planned(config, None, inputs.view).calibration.streamed
        assert streamed is not None  # else the method was refused
        written = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file())
        needed = max(needed, streamed.run - written)
        temporary = Path(gettempdir())
        if temporary.stat().st_dev == run.root.stat().st_dev:
            needed += streamed.disk
        else:
            check_free_space(temporary, streamed.disk, "TMPDIR")
    run.check_free_space(needed)


def _compressed(
    config: CompressConfig, inputs: Inputs, plan: Plan, factors: Mapping[str, Tensor]
) -> LoadedModel:
    """Return the whole compressed model, to be saved.

    For a sharded model, read the source again and apply the plan: no other process is needed.

    Raises:
        ModelError: If the source has changed.
    """
    if not is_sharded(inputs.loaded.model):
        return inputs.loaded
    loaded = load_model(replace(config.model, device="cpu"))
    if model_hash(loaded.model) != inputs.hashes["model"]:
        raise ModelError(f"{loaded.origin.name} has changed since the command started")
    apply_operations(DecoderView(loaded.model), plan.operations, factors)
    return loaded


def _measure(
    config: CompressConfig, inputs: Inputs, logs: Path, progress: RunProgress, stop: StopRequest
) -> Measure:
    if inputs.stored is not None:
        return inputs.stored
    assert inputs.data is not None  # there are windows, or stored scores
    if streamed_weights(inputs.loaded.model) is not None:
        max_bytes = config.statistics.max_memory * 1e9
        return StreamedMeasure(inputs.data, store=progress, max_bytes=max_bytes, track=track)
    measure = TrainerMeasure(
        inputs.data,
        config.trainer,
        logs,
        store=progress,
        stop=stop,
        max_bytes=config.statistics.max_memory * 1e9,
        priced_windows=config.statistics.priced_windows,
        caches=_reads_hidden_states_again(config.method)
        and pass_on_hidden_states_only(inputs.view),
        token_counts=inputs.token_counts,
    )
    if inputs.shared is None:
        return measure
    return SharedMeasure(measure, inputs.shared, progress, _settings_of_statistics(config, inputs))


def _check_splittable(method: MethodConfig) -> None:
    """Refuse a method that needs whole layers in every process: a ``ConfigError``."""
    for key, work in (
        ("replacement", "trains a whole layer"),
        ("directions_of", "changes a whole model"),
    ):
        if getattr(method, key) is not None:
            raise ConfigError(
                f"trainer.strategy is fsdp, but method {method.name} {work} in every process; use "
                "ddp"
            )
    if method.embeddings == "factors":
        raise ConfigError(
            "trainer.strategy is fsdp, but method.embeddings factors needs whole rows in every "
            "process; use ddp, or set method.embeddings=none"
        )


def _reads_hidden_states_again(method: MethodConfig) -> bool:
    """Return whether later passes over the text can skip the first layers."""
    return (
        method.schedule == "iterative"
        or method.pattern is not None
        or method.ranks == "sensitivity"
    )


def _settings_of_statistics(config: CompressConfig, inputs: Inputs) -> Facts:
    """Return the settings that statistics depend on, to the last bit."""
    settings = to_dict(config)
    sections = {
        section: {k: v for k, v in settings[section].items() if k not in without_effect}
        for section, without_effect in _WITHOUT_EFFECT.items()
    }
    # Other parts of a sum round differently.
    number, sharded = processes.num_processes(), is_sharded(inputs.loaded.model)
    return {**sections, "processes": number, "sharded": sharded}


def _finish(
    config: CompressConfig, inputs: Inputs, phases: Phases, progress: RunProgress
) -> Finish:
    # Only predictions by curvature can be compared with a measurement.
    count = config.statistics.measured_windows if config.method.weighting == "kfac" else 0
    return FinishDecision(
        held_out=inputs.held_out.select(range(min(count, len(inputs.held_out)))) if count else None,
        data=inputs.data,
        max_bytes=config.statistics.max_memory * 1e9,
        phases=phases,
        track=track,
        store=progress.refit_layers,
    )


def _perplexity(config: CompressConfig, inputs: Inputs, phases: Phases, which: str) -> float:
    windows, batch_size = inputs.held_out, config.evaluation.batch_size
    description = f"perplexity, {which}"
    with phases(EVALUATE):
        if streamed_weights(inputs.loaded.model) is None:
            return tracked_perplexity(inputs.view, windows, batch_size, description)
        return sweep_perplexity(
            inputs.view,
            windows,
            batch_size,
            max_bytes=config.statistics.max_memory * 1e9,
            track=track,
            description=description,
        )


def _timed(measure: Measure, phases: Phases) -> Measure:
    def timed(view: DecoderView, step: Step) -> Statistics:
        if step.needs.is_empty:  # explicit layers, or scores that need no data
            return measure(view, step)
        with phases(PHASE_OF_STEP.get(step.name, step.name)):
            return measure(view, step)

    return timed
