"""What can be checked of a compensation before its model exists, or without its weights."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase

from grasp_lightning.callbacks.placement import check_placement
from grasp_lightning.commands.teacher import DenseModel
from grasp_lightning.commands.training_inputs import (
    check_dtype,
    check_steps,
    matched_stages,
    run_bytes,
)
from grasp_lightning.config import CompensateConfig, Strategy
from grasp_lightning.config.compensate_settings import needs_dense, uses_instructions
from grasp_lightning.data.datamodules import InstructionData
from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.section_windows import readable_training_windows
from grasp_lightning.errors import ModelError
from grasp_lightning.memory.compensation import trained_parameters
from grasp_lightning.memory.forecast import adapters_of, cached_predictions
from grasp_lightning.memory.model_shape import model_shape, shape_after
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import resolve_device
from grasp_lightning.plan import Operation, Plan
from grasp_lightning.run_folder import check_free_space
from grasp_lightning.storage.teacher_cache import has_shards
from grasp_lightning.training.compensation import trainable_linears
from grasp_lightning.training.strategies import check_strategy


def check_training(
    config: CompensateConfig,
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads_hub: bool,
    plan: Plan | None = None,
    compression: Iterable[Operation] = (),
) -> list[str]:
    """Check device, dtype, teacher and texts of a compensation; wrong ones are a ``GraspError``.

    Args:
        config: The configuration; ``check_settings`` has passed it.
        view: The model that is trained, or the dense one; its weights may be on the meta device.
        tokenizer: Its tokenizer.
        reads_hub: Whether to read texts on the hub, too.
        plan: The plan that made the model; None if it is unknown or still to be made.
        compression: What will be done to the model before.

    Returns:
        The sources of text that were not read.
    """
    device = resolve_device(config.model.device)
    check_placement(config.trainer, device, get_args(Strategy), "compensation")
    check_strategy(config.trainer.strategy, device)
    named = config.model.dtype
    check_dtype(config, view.model.dtype if named == "auto" else getattr(torch, named))
    if needs_dense(config):
        dense = DenseModel(config, view.model, tokenizer)
        if config.objective == "local":
            matched_stages(config, view, dense, plan, compression)
    if uses_instructions(config):
        return _check_instructions(config, view, tokenizer, reads_hub=reads_hub)
    return _check_windows(config, view, tokenizer, reads_hub=reads_hub)


def check_trained(config: CompensateConfig, view: DecoderView, prediction: Prediction) -> int:
    """Return how many parameters a compensation trains after a compression, about.

    Args:
        config: The compensation.
        view: The dense model.
        prediction: What the compression does.

    Raises:
        ModelError: If nothing would be left to train.
    """
    compressed = shape_after(model_shape(view), prediction.operations, prediction.most)
    everything = replace(config, lora=replace(config.lora, targets=()))
    trained = trained_parameters(compressed, adapters_of(everything))
    # What replaced trains may be known to the data only: weights that are set, for example.
    if not trained and config.train != "replaced":
        raise ModelError(
            f"train: {config.train} needs low-rank or narrowed linears, and the compression leaves "
            "none: use train: lora or all"
        )
    # Compression splits linears into factors of the same name.
    of_dense = [name for name in config.lora.targets if not name.endswith((".left", ".right"))]
    if of_dense:
        trainable_linears(view, "lora", of_dense)
    return trained


def training_bytes(
    config: CompensateConfig, view: DecoderView, parameters: int, trained: int
) -> int:
    """Return the bytes that a compensation writes into its run folder, about.

    An empty ``distillation.cache_dir`` without room for the cache is an ``OutputError``.

    Args:
        config: The configuration.
        view: The model that is trained, or the dense one.
        parameters: Number of all parameters.
        trained: Number of trained ones.
    """
    needed = run_bytes(config, view, parameters, trained)
    cached = cached_predictions(config, int(view.model.config.get_text_config().vocab_size))
    size = 0 if cached is None else cached.num_bytes or 0
    if config.distillation.cache_dir is None:
        return needed + size
    folder = Path(config.distillation.cache_dir).expanduser()
    if not has_shards(folder):
        check_free_space(folder, size, "distillation.cache_dir")
    return needed


def _check_windows(
    config: CompensateConfig,
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads_hub: bool,
) -> list[str]:
    check_length(view, config.text.seqlen, "text.seqlen")
    training = config.training
    steps = training.epochs * math.ceil(config.text.num_samples / training.batch_size)
    check_steps(config, min(steps, training.max_steps or steps))
    found = readable_training_windows(config.text, tokenizer, config.seed, reads_hub=reads_hub)
    for _, windows in found:
        if windows is not None:
            check_vocabulary(view, windows.input_ids)
    return [source for source, windows in found if windows is None]


def _check_instructions(
    config: CompensateConfig,
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads_hub: bool,
) -> list[str]:
    check_length(view, config.data.max_length, "data.max_length")
    if config.data.source in HUB_INSTRUCTIONS and not reads_hub:
        return [config.data.source]
    data = InstructionData(config.data, tokenizer, config.training, config.seed)
    check_vocabulary(view, data.samples.train.input_ids)
    check_steps(config, len(data.steps()))
    return []
