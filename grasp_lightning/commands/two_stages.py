"""``compress --compensate``: compress a model and train the result, in one run folder.

The compensation writes the folder. The compression is a run of its own in its subfolder
``compressed``, so it is finished, resumed and refused like any other.
"""

import gc
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from grasp_lightning import processes
from grasp_lightning.commands.compensate import (
    CompensateRun,
    check_cache_folder,
    protected_folders,
    run_compensate,
    settings_in_folder,
)
from grasp_lightning.commands.compress import resolved, run_compress
from grasp_lightning.commands.inputs import bytes_needed
from grasp_lightning.commands.training_checks import (
    check_trained,
    check_training,
    training_bytes,
)
from grasp_lightning.commands.vocabulary import without_weights
from grasp_lightning.commands.workflow import begins_anew, output_folder
from grasp_lightning.config import CompensateConfig, CompressConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.evaluation.peak_memory import forget_peak
from grasp_lightning.methods import predict
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.in_memory import ModelInMemory
from grasp_lightning.models.loading import resolve_device
from grasp_lightning.run_folder import RunFolder, check_free_space
from grasp_lightning.run_folder.folder import RunState
from grasp_lightning.run_folder.names import COMPRESSED, MODEL


def run_two_stages(
    config: CompressConfig, second: CompensateConfig, given: ModelInMemory | None = None
) -> CompensateRun:
    """Compress a model and train the result; return the run of the training.

    What can be checked of the training is checked first. Each stage resumes as its command does,
    and a finished one is not repeated.

    Args:
        config: The compression; its ``output_dir`` is the folder of both stages.
        second: The training after it, from ``second_stage``.
        given: As in ``run_compress``.
    """
    first, second = stages(config, second)
    states = processes.on_first(lambda: look_up(first, second, given))
    if states[1] != "finished":
        if states[0] != "finished":
            _check(first, second, given)
        _forget_overwritten(second)
        run_compress(first, given)
        _free()
        forget_peak(resolve_device(second.model.device))
    return run_compensate(replace(second, overwrite=False), follows_compression=True)


def stages(
    config: CompressConfig, second: CompensateConfig
) -> tuple[CompressConfig, CompensateConfig]:
    """Return the configurations of both stages with their folders."""
    folder = output_folder(config, "runs/first")
    compressed = Path(folder) / COMPRESSED
    model = replace(second.model, path=str(compressed / MODEL))
    return (
        replace(config, output_dir=str(compressed), compensate=None, dry_run=False),
        replace(second, output_dir=folder, model=model),
    )


def look_up(
    first: CompressConfig, second: CompensateConfig, given: ModelInMemory | None = None
) -> tuple[RunState, RunState]:
    """Return what the folders of both stages contain, and write nothing.

    What the stages would refuse is refused.
    """
    check_cache_folder(second)
    settings = settings_in_folder(second, follows_compression=True)
    protected = protected_folders(second, follows_compression=True)
    first, sources = resolved(first, given)
    root, state = RunFolder.look_up(
        str(second.output_dir),
        settings,
        overwrite=second.overwrite,
        protected=[*protected, *sources],
    )
    if state == "finished" and not (root / COMPRESSED).exists():
        return "finished", state  # deleted to save space
    _, compressed = RunFolder.look_up(
        str(first.output_dir), to_dict(first), overwrite=first.overwrite, protected=sources
    )
    return compressed, state


def check_second_stage(
    first: CompressConfig,
    second: CompensateConfig,
    view: DecoderView,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads_hub: bool,
) -> tuple[list[str], int]:
    """Check a compensation before the compression; return the texts not read.

    Also returns the bytes that both stages write, about.

    Args:
        first: The compression, with its method resolved.
        second: The compensation.
        view: The dense model.
        tokenizer: Its tokenizer.
        reads_hub: Whether to read texts on the hub, too.
    """
    prediction = predict(view, first.method)
    trained = check_trained(second, view, prediction)
    unread = check_training(
        second, view, tokenizer, reads_hub=reads_hub, compression=prediction.operations
    )
    needed = training_bytes(second, view, prediction.most, trained)
    return unread, needed + bytes_needed(prediction, view.model.dtype)


def _check(first: CompressConfig, second: CompensateConfig, given: ModelInMemory | None) -> None:
    first, _ = resolved(first, given)
    if given is None:
        model, tokenizer, first, _ = without_weights(first)
    else:
        model, tokenizer = given.model, given.tokenizer
    view = DecoderView(model)
    _, needed = check_second_stage(first, second, view, tokenizer, reads_hub=True)
    check_free_space(Path(str(second.output_dir)).expanduser(), needed)


def _forget_overwritten(second: CompensateConfig) -> None:
    """Delete an earlier compensation that is to be overwritten: its compression will be another.

    A requeued job, which the same command starts, resumes its own.
    """
    output_dir = str(second.output_dir)
    settings = settings_in_folder(second, follows_compression=True)

    def forget() -> None:
        protected = protected_folders(second, follows_compression=True)
        RunFolder.open(output_dir, settings, overwrite=True, protected=protected).discard()

    if begins_anew(output_dir, settings, overwrite=second.overwrite):
        processes.on_first(forget)


def _free() -> None:
    """Free what the compression held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
