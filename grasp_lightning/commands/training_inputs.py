"""Inputs of ``compensate``: models, plan and texts, checked before anything is measured."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, get_args

import torch

from grasp_lightning import processes
from grasp_lightning.callbacks.placement import check_trainer
from grasp_lightning.commands.stages import LOAD
from grasp_lightning.commands.teacher import DenseModel, Lesson, lesson_of
from grasp_lightning.config import CompensateConfig, Strategy
from grasp_lightning.config.compensate_settings import ADAPTER_MODES, uses_instructions
from grasp_lightning.data.datamodules import InstructionData, TextData, TrainingData
from grasp_lightning.data.section_windows import evaluation_windows
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, ModelError, PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, resolve_device
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.sliced import stream_settings
from grasp_lightning.models.source import resolve_source
from grasp_lightning.models.streamed_loading import load_streamed
from grasp_lightning.models.verification import can_generate
from grasp_lightning.plan import Operation, Plan, SliceStream
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.model_folder import read_plan
from grasp_lightning.storage.sampled_text import SAMPLE, SampledText
from grasp_lightning.training.compensation import (
    own_parameters,
    rewritten_parameters,
    trainable_linears,
)
from grasp_lightning.training.hidden_cache import pass_on_hidden_states_only
from grasp_lightning.training.local_stages import LocalStage, local_stages
from grasp_lightning.training.strategies import check_strategy, is_deepspeed, is_sharded_strategy

_SAFETY = 1.1  # tokenizer, report and logs, in addition to weights and checkpoint
_CHECKPOINT_BYTES = 4 * 4 * 2  # per trained parameter: Adam's two, itself, its best; twice, to swap
_SLICED: Final = (
    "objective: local compares hidden states, but those of this model are rotated and sliced, "
    "unlike those of distillation.teacher; use objective: distill"
)


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """The checked inputs of a compensation.

    Attributes:
        digest: Hash of the weights, if reading them has given it: of a streamed model.
        view: The model of ``loaded``.
        held_out: Text for the perplexity before and after.
        lesson: What the dense model contributes.
        bytes_needed: Bytes that the run writes, about, besides the cache of a teacher.
        generates: Whether the model generates with its cache.
        rewritten: Further parameters for ``train: replaced``.
        plan: The plan beside the model; None if there is none.
        stages: Which layers ``objective: local`` trains together.
    """

    loaded: LoadedModel
    digest: str | None
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


def prepare(config: CompensateConfig, phases: Phases, run: RunFolder | None) -> TrainingInputs:
    """Load the models and texts, and refuse what cannot be trained; nothing is measured.

    Args:
        config: The configuration; ``check_settings`` has passed it.
        phases: Times the loading.
        run: Keeps text that the dense model writes; None keeps none.
    """
    device, strategy = resolve_device(config.model.device), config.trainer.strategy
    check_trainer(config.trainer, device, get_args(Strategy), "compensation")
    check_strategy(strategy, device)
    with phases(LOAD, excluding=(SAMPLE,)):
        loaded, digest = _load(config)
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
            stages = _checked_stages(config, view, lesson.dense, plan, data)
        check_length(view, config.evaluation.seqlen, "evaluation.seqlen")
        held_out = evaluation_windows(config.evaluation, loaded.tokenizer)
        check_vocabulary(view, held_out.input_ids)
        # Reading all layers for each token would take long.
        generates = digest is not None or can_generate(loaded.model)
    return TrainingInputs(
        loaded=loaded,
        digest=digest,
        view=view,
        data=data,
        held_out=held_out,
        lesson=lesson,
        device=device,
        bytes_needed=run_bytes(config, view, count_parameters(view.model), trained),
        generates=generates,
        rewritten=rewritten,
        plan=plan,
        stages=stages,
    )


def _load(config: CompensateConfig) -> tuple[LoadedModel, str | None]:
    """Return the model, and for a streamed one the hash of its weights."""
    if config.model.loading == "streamed":
        return load_streamed(config.model, may_be_compressed=True)
    # A model that will be split need not fit on the device.
    is_split = is_sharded_strategy(config.trainer.strategy)
    loaded = load_model(replace(config.model, device="cpu") if is_split else config.model)
    check_not_quantized(loaded.model, ModelError)
    return loaded, None


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


def run_bytes(config: CompensateConfig, view: DecoderView, parameters: int, trained: int) -> int:
    """Return the bytes that a training writes, about, besides the cache of a teacher.

    Args:
        config: The configuration.
        view: The model that is trained, or the dense one.
        parameters: Number of all parameters.
        trained: Number of trained ones.
    """
    size = view.model.dtype.itemsize
    kept = _CHECKPOINT_BYTES * trained
    if config.objective == "local":  # weights of all stages, and the checkpoint of one
        share = min(config.local.layers_at_once / view.num_layers, 1.0)
        kept = int(share * kept) + size * trained
    return int(_SAFETY * (size * parameters + kept))


def trained_bound(config: CompensateConfig, view: DecoderView, rewritten: frozenset[str]) -> int:
    """Return the most parameters that are trained; a model with none to train is refused."""
    if config.train == "all" or config.train == "replaced":  # noqa: PLR1714  # for mypy
        return sum(p.numel() for p in own_parameters(view, config.train, rewritten).values())
    linears = trainable_linears(view, config.train, config.lora.targets)
    return sum(linear.weight.numel() for linear in linears.values())


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


def matched_stages(
    config: CompensateConfig,
    view: DecoderView,
    dense: DenseModel,
    plan: Plan | None,
    compression: Iterable[Operation] = (),
) -> list[LocalStage]:
    """Return the stages of a layer-local training; no weights are read.

    Args:
        config: The configuration.
        view: The model that is trained.
        dense: The dense model.
        plan: The plan that made the model; None if it is unknown or still to be made.
        compression: What will be done to the model before.

    Raises:
        ModelError: If the hidden states cannot be compared.
    """
    own = view.model.config.get_text_config().hidden_size
    if stream_settings(view.model) or any(isinstance(o, SliceStream) for o in compression):
        raise ModelError(_SLICED)
    if own != dense.hidden_size:
        raise ModelError(
            f"distillation.teacher has {dense.hidden_size} features in its hidden states, the "
            f"model has {own}; use the dense model that was compressed"
        )
    return local_stages(view.num_layers, dense.num_layers, plan, config.local.layers_at_once)


def _training_data(
    config: CompensateConfig, loaded: LoadedModel, view: DecoderView, text: SampledText | None
) -> TrainingData:
    if uses_instructions(config):
        check_length(view, config.data.max_length, "data.max_length")
        return InstructionData(config.data, loaded.tokenizer, config.training, config.seed)
    check_length(view, config.text.seqlen, "text.seqlen")
    return TextData(config.text, loaded.tokenizer, config.training, config.seed, text)


def _checked_stages(
    config: CompensateConfig,
    view: DecoderView,
    dense: DenseModel,
    plan: Plan | None,
    data: TrainingData,
) -> list[LocalStage]:
    """Return the stages of a layer-local training.

    Raises:
        ConfigError: If there are fewer windows than processes.
        ModelError: If the hidden states of the two models cannot be compared.
    """
    stages = matched_stages(config, view, dense, plan)
    if not pass_on_hidden_states_only(view):
        raise ModelError(
            f"decoder layers of {type(view.model).__name__} pass on more than hidden states, such "
            "as keys and values, so they cannot be trained one by one: use another objective"
        )
    if len(data.samples.train) < processes.num_processes():
        raise ConfigError(
            f"text.num_samples is {len(data.samples.train)}, but there are "
            f"{processes.num_processes()} processes, and each needs a window: raise it"
        )
    return stages
