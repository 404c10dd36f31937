"""``compensate``: train a compressed model briefly, and write it at its own size."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from grasp_lightning import processes
from grasp_lightning.callbacks.placement import check_trainer
from grasp_lightning.callbacks.split_model import MeasureInFit
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.commands.local import LocalRun, check_local
from grasp_lightning.commands.outputs import (
    CompensationOutcome,
    read_compression,
    write_outputs,
)
from grasp_lightning.commands.stages import (
    EVALUATE,
    LOAD,
    SAVE,
    TRAIN,
    compensate_stages,
    compensate_work,
)
from grasp_lightning.commands.teacher import Lesson, lesson_of, teacher_settings
from grasp_lightning.commands.training import TrainingRun
from grasp_lightning.commands.workflow import (
    Settings,
    output_folder,
    run_in_folder,
    tracked_perplexity,
)
from grasp_lightning.config import CompensateConfig, Strategy
from grasp_lightning.config.compensate_settings import (
    ADAPTER_MODES,
    check_settings,
    uses_instructions,
    uses_self,
)
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.datamodules import InstructionData, TextData, TrainingData
from grasp_lightning.data.section_windows import evaluation_windows
from grasp_lightning.data.windows import TokenWindows, own_micro_batches
from grasp_lightning.errors import ConfigError, ModelError, PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.checkpoint import check_not_quantized, push_folder
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, resolve_device
from grasp_lightning.models.model_settings import named_by
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.source import resolve_source
from grasp_lightning.models.verification import can_generate
from grasp_lightning.plan import Plan
from grasp_lightning.progress import RunBar, expect_work
from grasp_lightning.reporting.metrics import Change, CompensationMetrics
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import COMPRESSED, MODEL
from grasp_lightning.storage.model_folder import read_plan
from grasp_lightning.storage.sampled_text import SAMPLE, SampledText
from grasp_lightning.storage.shared import check_shared_folder
from grasp_lightning.storage.training import RunNotes, check_inputs
from grasp_lightning.training.compensation import (
    CompensationModule,
    own_parameters,
    rewritten_parameters,
    trainable_linears,
)
from grasp_lightning.training.compensation.adapters import consolidated
from grasp_lightning.training.local_stages import LocalStage
from grasp_lightning.training.strategies import check_strategy, is_deepspeed, is_sharded_strategy

_MEMORY_KEYS = (
    "training.micro_batch_size, data.max_length, text.seqlen or evaluation.batch_size, or set "
    "training.gradient_checkpointing"
)
# Perplexity and validation loss.
_Measured = tuple[Change[float | None], Change[float | None]]
_SAFETY = 1.1  # tokenizer, report and logs, in addition to weights and checkpoint
_CHECKPOINT_BYTES = 4 * 4 * 2  # per trained parameter: Adam's two, itself, its best; twice, to swap


@dataclass(frozen=True, kw_only=True)
class CompensateRun:
    """A finished run: its folder as the user named it, and the address of the uploaded model."""

    folder: Path
    metrics: CompensationMetrics
    uploaded: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    loaded: LoadedModel
    view: DecoderView
    data: TrainingData
    held_out: TokenWindows
    lesson: Lesson
    device: torch.device
    bytes_needed: int
    generates: bool
    rewritten: frozenset[str]
    plan: Plan | None
    stages: list[LocalStage]


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
            prepare=lambda run: _prepare(config, phases, run),
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
    inputs: _Inputs,
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
    config: CompensateConfig, run: RunFolder, inputs: _Inputs, notes: RunNotes, stop: StopRequest
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
    inputs: _Inputs,
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
    inputs: _Inputs,
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


def _prepare(config: CompensateConfig, phases: Phases, run: RunFolder | None) -> _Inputs:
    device, strategy = resolve_device(config.model.device), config.trainer.strategy
    check_trainer(config.trainer, device, get_args(Strategy), "compensation")
    check_strategy(strategy, device)
    with phases(LOAD, excluding=(SAMPLE,)):
        # A model that will be split need not fit on the device.
        loaded = load_model(
            replace(config.model, device="cpu") if is_sharded_strategy(strategy) else config.model
        )
        check_not_quantized(loaded.model, ModelError)
        view = DecoderView(loaded.model)
        plan = plan_beside(config)
        rewritten = rewritten_by_plan(config, view, plan)
        trained = trained_bound(config, view, rewritten)
        check_dtype(config, loaded.model.dtype)
        data, lesson = lesson_of(
            config, loaded, lambda text: _training_data(config, loaded, view, text), phases, run
        )
        check_vocabulary(view, data.samples.train.input_ids)
        check_steps(config, len(data.steps()))
        stages = []
        if config.objective == "local":
            assert lesson.dense is not None  # it is the teacher
            stages = check_local(config, view, lesson.dense, plan, data)
        check_length(view, config.evaluation.seqlen, "evaluation.seqlen")
        held_out = evaluation_windows(config.evaluation, loaded.tokenizer)
        check_vocabulary(view, held_out.input_ids)
        generates = can_generate(loaded.model)
    return _Inputs(
        loaded=loaded,
        view=view,
        data=data,
        held_out=held_out,
        lesson=lesson,
        device=device,
        bytes_needed=bytes_needed(count_parameters(view.model), loaded.model.dtype, trained),
        generates=generates,
        rewritten=rewritten,
        plan=plan,
        stages=stages,
    )


def plan_beside(config: CompensateConfig) -> Plan | None:
    """Return the plan beside the model; a damaged one is refused only if it is needed."""
    try:
        return read_plan(resolve_source(config.model).folder)
    except PlanError:
        if config.train == "replaced" or config.objective == "local":
            raise
        return None


def rewritten_by_plan(
    config: CompensateConfig, view: DecoderView, plan: Plan | None
) -> frozenset[str]:
    """Return further parameters for ``train: replaced``, from the plan beside the model."""
    if config.train != "replaced" or plan is None:
        return frozenset()
    return rewritten_parameters(view, plan)


def bytes_needed(parameters: int, dtype: torch.dtype, trained: int) -> int:
    """Return the bytes that a run writes, about, besides the cache of a teacher."""
    return int(_SAFETY * (parameters * dtype.itemsize + _CHECKPOINT_BYTES * trained))


def trained_bound(config: CompensateConfig, view: DecoderView, rewritten: frozenset[str]) -> int:
    """Return the most parameters that are trained; a model with none to train is refused."""
    if config.train == "all" or config.train == "replaced":  # noqa: PLR1714  # for mypy
        return sum(p.numel() for p in own_parameters(view, config.train, rewritten).values())
    linears = trainable_linears(view, config.train, config.lora.targets)
    return sum(linear.weight.numel() for linear in linears.values())


def _training_data(
    config: CompensateConfig, loaded: LoadedModel, view: DecoderView, text: SampledText | None
) -> TrainingData:
    if uses_instructions(config):
        check_length(view, config.data.max_length, "data.max_length")
        return InstructionData(config.data, loaded.tokenizer, config.training, config.seed)
    check_length(view, config.text.seqlen, "text.seqlen")
    return TextData(config.text, loaded.tokenizer, config.training, config.seed, text)


def check_dtype(config: CompensateConfig, dtype: torch.dtype) -> None:
    """Refuse a model whose weights are too coarse for what trains them."""
    trainer = config.trainer
    is_coarse = dtype.itemsize < torch.float32.itemsize
    # A single layer is trained in float32 copies.
    trains_itself = config.train not in ADAPTER_MODES and config.objective != "local"
    if trains_itself and is_coarse:
        raise ConfigError(
            f"train: {config.train} would train weights in {dtype}, which is too "
            "coarse for small steps; set model.dtype: float32 (trainer.precision: bf16-mixed "
            "computes in bfloat16), or train: lora"
        )
    if is_deepspeed(trainer.strategy) and trainer.precision == "32-true" and is_coarse:
        raise ConfigError(
            f"trainer.strategy {trainer.strategy} with precision 32-true would convert the weights "
            f"from {dtype} into float32; set trainer.precision: bf16-mixed, or "
            "model.dtype: float32"
        )


def check_steps(config: CompensateConfig, num_steps: int) -> None:
    """Refuse a warm-up that would not end."""
    if config.training.max_time is not None:  # the warm-up is planned, too
        return
    if config.optimizer.warmup_steps >= num_steps:
        raise ConfigError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}, but there are only "
            f"{num_steps} steps; lower it"
        )


def _perplexity(config: CompensateConfig, inputs: _Inputs, phases: Phases, when: str) -> float:
    with phases(EVALUATE):
        return tracked_perplexity(
            inputs.view, inputs.held_out, config.evaluation.batch_size, f"perplexity, {when}"
        )
