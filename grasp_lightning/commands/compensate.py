"""``compensate``: train a compressed model briefly, and write it at its own size."""

from dataclasses import dataclass
from pathlib import Path

from grasp_lightning import processes
from grasp_lightning.callbacks.split_model import MeasureInFit
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.commands.local import LocalRun
from grasp_lightning.commands.outputs import (
    CompensationOutcome,
    read_compression,
    write_outputs,
)
from grasp_lightning.commands.stages import (
    EVALUATE,
    SAVE,
    TRAIN,
    compensate_stages,
    compensate_work,
)
from grasp_lightning.commands.teacher import teacher_settings
from grasp_lightning.commands.training import TrainingRun
from grasp_lightning.commands.training_inputs import TrainingInputs, prepare
from grasp_lightning.commands.workflow import (
    Settings,
    output_folder,
    run_in_folder,
    tracked_perplexity,
)
from grasp_lightning.config import CompensateConfig
from grasp_lightning.config.compensate_settings import check_settings, uses_self
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.windows import own_micro_batches
from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.checkpoint import push_folder
from grasp_lightning.models.integrity import model_hash
from grasp_lightning.models.model_settings import named_by
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.source import resolve_source
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.progress import RunBar, expect_work, track
from grasp_lightning.reporting.metrics import Change, CompensationMetrics
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import COMPRESSED, MODEL
from grasp_lightning.storage.shared import check_shared_folder
from grasp_lightning.storage.training import RunNotes, check_inputs
from grasp_lightning.training.compensation import CompensationModule
from grasp_lightning.training.compensation.adapters import consolidated
from grasp_lightning.training.strategies import is_sharded_strategy
from grasp_lightning.training.sweep import sweep_perplexity

_MEMORY_KEYS = (
    "training.micro_batch_size, data.max_length, text.seqlen or evaluation.batch_size, or set "
    "training.gradient_checkpointing"
)
# Perplexity and validation loss.
_Measured = tuple[Change[float | None], Change[float | None]]


@dataclass(frozen=True, kw_only=True)
class CompensateRun:
    """A finished run: its folder as the user named it, and the address of the uploaded model."""

    folder: Path
    metrics: CompensationMetrics
    uploaded: str | None = None


def run_compensate(config: CompensateConfig, *, follows_compression: bool = False) -> CompensateRun:
    """Train a compressed model as a configuration says, and write its run folder.

    The metrics of a finished run are only read; an unfinished run resumes after its last saved
    step. SIGINT and SIGTERM save at the next step and raise ``Interrupted``. A wrong configuration,
    model, text or number is a ``GraspError``, which leaves nothing of a new run.

    Args:
        config: The configuration.
        follows_compression: Whether a compression in the same run folder made the model, see
            ``two_stages``.

    Raises:
        ConfigError: If ``dry_run`` is set.
    """
    if config.dry_run:
        raise ConfigError("dry_run is set: use dry_run_compensate, or leave it out to make a run")
    folder, uploaded = Path(output_folder(config, "runs/second")), None
    check_settings(config)
    check_cache_folder(config)
    stages = compensate_stages(
        is_split=is_sharded_strategy(config.trainer.strategy),
        writes_text=uses_self(config),
        is_cached=config.distillation.cache,
    )
    with RunBar(stages, is_shown=processes.is_first()) as bar:
        phases = Phases(bar.follow)
        metrics = run_in_folder(
            config,
            protected=protected_folders(config, follows_compression=follows_compression),
            memory_advice=_MEMORY_KEYS,
            prepare=lambda run: prepare(config, phases, run),
            execute=lambda run, inputs, stop: _execute(
                config, run, inputs, phases, stop, follows_compression=follows_compression
            ),
            read=CompensationMetrics.from_dict,
            settings=settings_in_folder(config, follows_compression=follows_compression),
        )
    if config.push_to_hub is not None:
        name = config.push_to_hub
        uploaded = processes.on_first(lambda: push_folder(folder / "model", name))
    return CompensateRun(folder=folder, metrics=metrics, uploaded=uploaded)


def settings_in_folder(config: CompensateConfig, *, follows_compression: bool) -> Settings:
    """Return the content of config.yaml; it names a model in the run folder by its place there."""
    settings = to_dict(config)
    if follows_compression:
        settings["model"]["path"] = f"{COMPRESSED}/{MODEL}"
    return settings


def check_cache_folder(config: CompensateConfig) -> None:
    """Refuse a ``distillation.cache_dir`` that overlaps the run folder."""
    if config.distillation.cache_dir is not None:
        folder = str(config.output_dir)
        check_shared_folder(config.distillation.cache_dir, folder, "distillation.cache_dir")


def protected_folders(config: CompensateConfig, *, follows_compression: bool) -> list[Path]:
    """Return the folders of models that must not be in, around or at the run folder."""
    folders = [] if follows_compression else [resolve_source(config.model).folder]
    if config.distillation.teacher is not None:
        with named_by("distillation.teacher"):
            folders.append(resolve_source(teacher_settings(config)).folder)
    return [folder for folder in folders if folder is not None]


def _execute(
    config: CompensateConfig,
    run: RunFolder,
    inputs: TrainingInputs,
    phases: Phases,
    stop: StopRequest,
    *,
    follows_compression: bool,
) -> CompensationMetrics:
    lesson = inputs.lesson
    processes.on_first(lambda: run.check_free_space(inputs.bytes_needed))
    lesson.keep_in(run)
    if (cache := lesson.cache) is not None:
        processes.on_first(lambda: cache.check_free_space(inputs.bytes_needed))
    expect_work(compensate_work(config, inputs.data, inputs.held_out, len(inputs.stages)))
    notes, view = RunNotes(run), inputs.view
    parameters = count_parameters(view.model)
    training = _training(config, run, inputs, notes, stop)
    hashes = {**inputs.data.fingerprint, **training.model_hashes}
    processes.on_first(lambda: check_inputs(run, hashes))
    lesson.prepare(config, inputs.data, phases)
    if isinstance(training, TrainingRun) and is_sharded_strategy(config.trainer.strategy):
        perplexity, validation_loss = _train_split(config, inputs, training, notes, phases)
    else:
        perplexity, validation_loss = _train(config, inputs, training, notes, phases)

    def write() -> CompensationMetrics:
        # Done here, so that only rank 0 loads a whole model.
        loaded = inputs.loaded
        if isinstance(training, TrainingRun) and is_sharded_strategy(config.trainer.strategy):
            with phases(SAVE):
                loaded = consolidated(config, training.gathered.state, inputs.rewritten)
        outcome = CompensationOutcome(
            config=config,
            loaded=loaded,
            data=inputs.data,
            training=training.summary,
            plan=inputs.plan,
            parameters_before=parameters,
            perplexity=perplexity,
            perplexity_tokens=inputs.held_out.num_targets,
            validation_loss=validation_loss,
            generates=inputs.generates,
            compression=read_compression(run) if follows_compression else None,
        )
        return write_outputs(run, outcome, phases)

    metrics = processes.on_first(write)
    notes.clear()
    run.finish()
    return metrics


def _training(
    config: CompensateConfig,
    run: RunFolder,
    inputs: TrainingInputs,
    notes: RunNotes,
    stop: StopRequest,
) -> TrainingRun | LocalRun:
    """Return what validates and trains the model."""
    lesson, rewritten = inputs.lesson, inputs.rewritten
    if config.objective == "local":
        assert lesson.dense is not None  # it is the teacher
        view, stages = inputs.view, inputs.stages
        return LocalRun(
            config,
            run,
            view,
            lesson.dense,
            inputs.data,
            stages,
            notes,
            stop,
            digest=inputs.digest or model_hash(view.model),
            rewritten=rewritten,
        )
    module = CompensationModule(
        inputs.view,
        config.optimizer,
        teacher=lesson.teacher,
        seed=config.seed,
        is_limited=config.training.max_time is not None,
    )
    return TrainingRun(
        config, run, module, inputs.data, stop, device=inputs.device, rewritten=rewritten
    )


def _train(
    config: CompensateConfig,
    inputs: TrainingInputs,
    training: TrainingRun | LocalRun,
    notes: RunNotes,
    phases: Phases,
) -> _Measured:
    before, loss_before = notes.noted("perplexity_before"), notes.noted("loss_before")
    if before is None:
        before = _perplexity(config, inputs, phases, "before")
        notes.note("perplexity_before", before)
    if loss_before is None and training.can_validate:
        with phases(EVALUATE):
            loss_before = training.validation_loss()
        notes.note("loss_before", loss_before)
    with phases(TRAIN):
        training.fit()
    after = _perplexity(config, inputs, phases, "after")
    with phases(EVALUATE):
        loss_after = training.validation_loss() if training.can_validate else None
    return Change(before=before, after=after), Change(before=loss_before, after=loss_after)


def _train_split(
    config: CompensateConfig,
    inputs: TrainingInputs,
    training: TrainingRun,
    notes: RunNotes,
    phases: Phases,
) -> _Measured:
    """Do what ``_train`` does inside one fit, where a split model is ready to run."""
    held_out = own_micro_batches(inputs.held_out, config.evaluation.batch_size)
    measure = MeasureInFit(held_out, notes, lambda: phases(EVALUATE))
    with phases(TRAIN, excluding=[EVALUATE]):
        training.fit(measure)
    assert measure.before is not None  # the fit has begun and ended
    assert measure.after is not None
    (before, loss_before), (after, loss_after) = measure.before, measure.after
    return Change(before=before, after=after), Change(before=loss_before, after=loss_after)


def _perplexity(
    config: CompensateConfig, inputs: TrainingInputs, phases: Phases, when: str
) -> float:
    windows, batch_size = inputs.held_out, config.evaluation.batch_size
    description = f"perplexity, {when}"
    with phases(EVALUATE):
        if streamed_weights(inputs.loaded.model) is None:
            return tracked_perplexity(inputs.view, windows, batch_size, description)
        return sweep_perplexity(
            inputs.view,
            windows,
            batch_size,
            max_bytes=config.local.max_memory * 1e9,
            track=track,
            description=description,
        )
