"""``compress``: from a configuration to a run folder with a smaller model in it."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from rich.progress import track
from torch import Tensor

from callbacks.measure import TrainerMeasure, check_trainer, is_split
from callbacks.stop_request import StopRequest
from grasp_lightning import processes
from grasp_lightning.commands.finish import CUT_LOSSES, REFIT, FinishDecision
from grasp_lightning.commands.outputs import Outcome, write_outputs
from grasp_lightning.commands.parsing import to_dict
from grasp_lightning.commands.phases import Phases
from grasp_lightning.commands.plan import predict
from grasp_lightning.commands.progress import (
    RunProgress,
    attempt,
    begins_anew,
    check_same_model,
    open_together,
    stored_metrics,
)
from grasp_lightning.commands.recut import StoredScores
from grasp_lightning.commands.sampled_text import SAMPLE, SampledText
from grasp_lightning.commands.tracked import tracked_perplexity
from grasp_lightning.config import CompressConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.mixture import mixture_parts
from grasp_lightning.data.windows import (
    TokenWindows,
    check_window_options,
    evaluation_windows,
)
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import CompressionMethod
from grasp_lightning.methods.layer_choice import SELECT
from grasp_lightning.methods.low_rank import ATTRIBUTION
from grasp_lightning.methods.weighted import CURVATURE
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, model_hash, resolve_device
from grasp_lightning.models.sharding import check_runs, is_sharded, process_mesh, shard
from grasp_lightning.models.size import count_inputs, measure_size
from grasp_lightning.models.source import resolve_source
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.pipeline import Finish, Measure, compress
from grasp_lightning.plan import Plan
from grasp_lightning.reporting.metrics import Metrics, Pair
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Statistics, Step

T = TypeVar("T")

_PHASE_OF_STEP = {SELECT: "similarity", ATTRIBUTION: "attribution", CURVATURE: "curvature"}
_MAX_SEED = 2**63 - 1
_MEMORY_KEYS = "calibration.batch_size, calibration.seqlen or evaluation.batch_size"
_SAFETY = 1.1  # tokenizer, report and logs, beside weights and factors


@dataclass(frozen=True, kw_only=True)
class CompressRun:
    """A finished run.

    Attributes:
        folder: The run folder, as the user named it.
        metrics: What was measured.
    """

    folder: Path
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a run works on, after everything that a user can get wrong was checked."""

    loaded: LoadedModel
    view: DecoderView
    method: CompressionMethod
    held_out: TokenWindows
    text: SampledText
    data: CalibrationData | None
    stored: StoredScores | None
    hashes: Mapping[str, str]
    bytes_needed: int


def run_compress(config: CompressConfig) -> CompressRun:
    """Compress a model as a configuration says, and write its run folder.

    A run that is finished already is not done again: its metrics are read. An unfinished one goes
    on where it was. SIGINT and SIGTERM save at the next batch and raise ``Interrupted``. A wrong
    configuration, model, corpus or number is a ``GraspError``, and leaves nothing of a new run.

    Args:
        config: What the user set.

    Returns:
        The finished run.

    Raises:
        ConfigError: If ``output_dir`` is not set, or is what ``from_scores`` names.
    """
    output_dir = config.output_dir
    if output_dir is None:
        raise ConfigError("output_dir is not set: name the run folder to write, e.g. runs/first")
    if config.from_scores is not None and _is_same(output_dir, config.from_scores):
        raise ConfigError(
            f"from_scores: {config.from_scores} is output_dir itself; name another output_dir"
        )
    config = replace(config, method=_resolved_method(config))
    model_folder = resolve_source(config.model).folder
    protected = [] if model_folder is None else [model_folder]
    stop, phases = StopRequest(), Phases()
    with stop.installed():
        anew = begins_anew(output_dir, to_dict(config), overwrite=config.overwrite)
        # Before anything of an earlier run is deleted.
        inputs = _prepare(config, phases) if anew else None
        with open_together(output_dir, to_dict(config), overwrite=anew, protected=protected) as run:
            if run.state == "finished":
                metrics = Metrics.from_dict(stored_metrics(run))
            else:
                with attempt(run, _MEMORY_KEYS):
                    if inputs is None:
                        inputs = _prepare(config, phases, run)
                    else:
                        inputs.text.keep_in(run)
                    metrics = _execute(config, run, inputs, phases, stop)
    return CompressRun(folder=Path(output_dir), metrics=metrics)


def _is_same(first: str, second: str) -> bool:
    one, other = (Path(path).expanduser().resolve() for path in (first, second))
    return one == other


def _resolved_method(config: CompressConfig) -> MethodConfig:
    try:
        return resolve_method(config.method)
    except ConfigError as error:
        if config.from_scores is None:
            raise
        raise ConfigError(
            f"{error} (keys that are not set here are those of {config.from_scores}; =null unsets "
            "one)"
        ) from error


def _execute(
    config: CompressConfig, run: RunFolder, inputs: _Inputs, phases: Phases, stop: StopRequest
) -> Metrics:
    processes.on_first(lambda: run.check_free_space(inputs.bytes_needed))
    view, method = inputs.view, inputs.method
    progress = RunProgress(
        run, Plan(method=method.name, options=method.options, inputs=inputs.hashes)
    )
    dense_size, num_inputs = measure_size(view), count_inputs(view)
    dense_perplexity = progress.noted("dense_perplexity")
    if dense_perplexity is None:
        dense_perplexity = _perplexity(config, inputs, phases, "dense")
        progress.note("dense_perplexity", dense_perplexity)
    apply_operations(view, progress.plan.operations, progress.factors)
    with TemporaryDirectory() as logs:
        measure = _timed(_measure(config, inputs, Path(logs), progress, stop), phases)
        with phases("factorize", excluding=(*_PHASE_OF_STEP.values(), CUT_LOSSES, REFIT)):
            finish = _finish(config, inputs, phases)
            plan = compress(view, method, measure, progress.plan, progress.add_step, finish=finish)
        with run.new_folder("logs") as folder:
            shutil.copytree(logs, folder, dirs_exist_ok=True)
    sizes = Pair(dense=dense_size, compressed=measure_size(view))
    perplexity = Pair[float | None](
        dense=dense_perplexity, compressed=_perplexity(config, inputs, phases, "compressed")
    )

    def write() -> Metrics:
        with phases("load"):
            loaded = _compressed(config, inputs, plan, progress.factors)
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
        )
        return write_outputs(run, outcome, phases)

    metrics = processes.on_first(write)
    progress.clear()
    if not config.statistics.store:
        progress.forget_moments()
    run.finish()
    return metrics


def _load(config: CompressConfig) -> tuple[LoadedModel, str]:
    """Return the model, and the hash of its weights.

    A model that is shared is read by one process of a node after the other, so that its memory
    holds one whole model at a time, and no device ever does.
    """
    if not is_split(config.trainer):
        loaded = load_model(config.model)
        return loaded, model_hash(loaded.model)
    device = resolve_device(config.model.device)
    mesh = process_mesh(device)

    def work() -> tuple[LoadedModel, str]:
        loaded = load_model(replace(config.model, device="cpu"))
        digest = model_hash(loaded.model) if processes.is_first() else ""
        shard(loaded.model, mesh, device)
        return loaded, digest

    loaded, digest = processes.in_turns(work)
    check_runs(loaded.model)
    return loaded, processes.on_first(lambda: digest)


def _compressed(
    config: CompressConfig, inputs: _Inputs, plan: Plan, factors: Mapping[str, Tensor]
) -> LoadedModel:
    """Return the compressed model as it is saved: whole.

    Of a model that is shared, the source is read again and the plan applied to it, which needs no
    weight from other processes.
    """
    if not is_sharded(inputs.loaded.model):
        return inputs.loaded
    loaded = load_model(replace(config.model, device="cpu"))
    if model_hash(loaded.model) != inputs.hashes["model"]:
        raise ModelError(f"{loaded.origin.name} has changed since this command was started")
    apply_operations(DecoderView(loaded.model), plan.operations, factors)
    return loaded


def _measure(
    config: CompressConfig, inputs: _Inputs, logs: Path, progress: RunProgress, stop: StopRequest
) -> Measure:
    if inputs.stored is not None:
        return inputs.stored
    assert inputs.data is not None  # there are windows, or stored scores
    return TrainerMeasure(
        inputs.data,
        config.trainer,
        logs,
        store=progress,
        stop=stop,
        max_bytes=config.statistics.max_memory * 1e9,
        priced_windows=config.statistics.priced_windows,
    )


def _finish(config: CompressConfig, inputs: _Inputs, phases: Phases) -> Finish:
    # Only curvature predicts what a measurement can be compared with.
    count = config.statistics.measured_windows if config.method.weighting == "kfac" else 0
    return FinishDecision(
        held_out=inputs.held_out.select(range(min(count, len(inputs.held_out)))) if count else None,
        data=inputs.data,
        max_bytes=config.statistics.max_memory * 1e9,
        phases=phases,
        track=_track,
    )


def _prepare(config: CompressConfig, phases: Phases, run: RunFolder | None = None) -> _Inputs:
    """Load model and text, and fail early on all that does not fit."""
    _check_numbers(config)
    check_window_options(config.calibration, "calibration")
    mixture_parts(config.calibration, "calibration")  # keys that do not fit together end the run
    check_window_options(config.evaluation, "evaluation")
    check_trainer(config.trainer, resolve_device(config.model.device))
    stored = None
    if config.from_scores is not None:
        stored = StoredScores(config.from_scores, config.calibration.seqlen)
    if stored is not None:  # what is asked for is scored already, or cannot be had
        config = replace(config, method=replace(config.method, score_all_layers=None))
    with phases("load", excluding=(SAMPLE,)):
        loaded, digest = _load(config)
        view = DecoderView(loaded.model)
        prediction = predict(view, config.method)
        method = build_method(config.method, view, _track)
        text = SampledText(
            loaded.model,
            digest,
            phases,
            earlier=None if config.from_scores is None else Path(config.from_scores),
            track=_track,
        )
        if run is not None:
            check_same_model(run, digest)
            text.keep_in(run)
        check_length(view, config.evaluation.seqlen, "evaluation.seqlen")
        held_out = evaluation_windows(config.evaluation, loaded.tokenizer)
        check_vocabulary(view, held_out.input_ids)
        hashes, data = {"model": digest}, None
        if stored is not None:
            stored.check(hashes["model"], method.options)
            hashes |= stored.inputs
        if stored is None or "refit" in method.options:
            if stored is not None:
                stored.check_windows({"seed": str(config.seed)})
            data = _calibration(config, loaded, view, text)
            if stored is not None:
                stored.check_windows(data.fingerprint)
            hashes |= data.fingerprint
    needed = (prediction.most + prediction.factors) * loaded.model.dtype.itemsize
    return _Inputs(
        loaded=loaded,
        view=view,
        method=method,
        held_out=held_out,
        text=text,
        data=data,
        stored=stored,
        hashes=hashes,
        bytes_needed=int(_SAFETY * needed),
    )


def _check_numbers(config: CompressConfig) -> None:
    limits = config.statistics
    if not 0 <= config.seed <= _MAX_SEED:
        raise ConfigError(f"seed must be from 0 to {_MAX_SEED}, got {config.seed}")
    if not limits.max_memory > 0:
        raise ConfigError(f"statistics.max_memory must be above 0 GB, got {limits.max_memory}")
    if limits.priced_windows < 1:
        raise ConfigError(
            f"statistics.priced_windows must be at least 1, got {limits.priced_windows}"
        )
    if limits.measured_windows < 0:
        raise ConfigError(
            f"statistics.measured_windows cannot be negative, got {limits.measured_windows}"
        )


def _calibration(
    config: CompressConfig, loaded: LoadedModel, view: DecoderView, text: SampledText
) -> CalibrationData:
    check_length(view, config.calibration.seqlen, "calibration.seqlen")
    if config.calibration.num_samples < processes.num_processes():
        raise ConfigError(
            f"calibration.num_samples is {config.calibration.num_samples}, fewer than the "
            f"{processes.num_processes()} processes: use fewer processes or more windows"
        )
    data = CalibrationData(config.calibration, loaded.tokenizer, config.seed, sample=text)
    check_vocabulary(view, data.windows.input_ids)
    return data


def _perplexity(config: CompressConfig, inputs: _Inputs, phases: Phases, which: str) -> float:
    with phases("evaluate"):
        return tracked_perplexity(
            inputs.view, inputs.held_out, config.evaluation.batch_size, f"perplexity, {which}"
        )


def _timed(measure: Measure, phases: Phases) -> Measure:
    def timed(view: DecoderView, step: Step) -> Statistics:
        if step.needs.is_empty:  # explicit layers, or scores that need no data
            return measure(view, step)
        with phases(_PHASE_OF_STEP.get(step.name, step.name)):
            return measure(view, step)

    return timed


def _track(items: Sequence[T], description: str) -> Iterable[T]:
    return track(items, description=description)
