"""``compress --dry_run``: the quick checks and the forecast of a run, without the run."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from grasp_lightning.callbacks.placement import check_placement
from grasp_lightning.commands.compress import resolved
from grasp_lightning.commands.inputs import bytes_needed, check_num_windows
from grasp_lightning.commands.plan import planned
from grasp_lightning.commands.vocabulary import without_weights
from grasp_lightning.config import (
    CompensateConfig,
    CompressConfig,
    EvaluationConfig,
    TrainerConfig,
)
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.config.values import check_values
from grasp_lightning.data.hub import HUB_CORPORA
from grasp_lightning.data.mixture import mixture_parts
from grasp_lightning.data.section_windows import evaluation_windows, local_calibration_windows
from grasp_lightning.data.sources import check_corpus
from grasp_lightning.launch import check_number
from grasp_lightning.methods import build_method
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import resolve_device
from grasp_lightning.run_folder import RunFolder, check_free_space
from grasp_lightning.run_folder.folder import RunState
from grasp_lightning.run_folder.names import CONFIG
from grasp_lightning.storage.recut import StoredScores


class Checked(NamedTuple):
    """A compression whose quick checks have passed.

    Attributes:
        config: The configuration, with its method resolved.
        view: The dense model, without weights.
        lines: The forecast of ``plan``.
        unread: Sources of text that were not read.
        needed: Bytes that the run writes, about.
    """

    config: CompressConfig
    view: DecoderView
    tokenizer: PreTrainedTokenizerBase
    lines: list[str]
    unread: list[str]
    needed: int


def dry_run_compress(config: CompressConfig) -> list[str]:
    """Make the quick checks of ``run_compress``, and write nothing.

    A wrong configuration, model, corpus or output folder raises the ``GraspError`` of the run. The
    values of the weights, text on the hub, and whatever needs a forward pass are not checked.

    Returns:
        Lines for the user: the forecast of ``plan``, the run folder, and what was not checked.
    """
    config, protected = resolved(config)
    assert config.output_dir is not None  # resolved has checked it
    root, state = RunFolder.look_up(
        config.output_dir, to_dict(config), overwrite=config.overwrite, protected=protected
    )
    if state == "finished":
        return finished_lines(root)
    checked = check_compression(config)
    check_free_space(root, checked.needed)
    folder = folder_lines(root, state, checked.needed, overwrite=config.overwrite)
    return [*checked.lines, "", *folder, unchecked_line(checked.unread)]


def check_compression(
    config: CompressConfig, second: CompensateConfig | None = None, source: str | None = None
) -> Checked:
    """Make the quick checks that do not concern the run folder.

    Args:
        config: The configuration, with its method resolved.
        second: The compensation whose memory is predicted; None for the defaults.
        source: Its file.
    """
    check_processes(config.trainer)
    check_values(config)
    mixture_parts(config.calibration, "calibration")
    check_placement(config.trainer, resolve_device(config.model.device))
    stored = None if config.from_scores is None else StoredScores(config.from_scores)
    model, tokenizer, config, vocabulary = without_weights(config)
    view = DecoderView(model)
    forecast = planned(replace(config, compensate=source), second, view, vocabulary)
    if stored is not None:
        config = replace(config, method=replace(config.method, score_all_layers=None))
    method = build_method(config.method, view)
    unread = check_held_out(config.evaluation, view, tokenizer)
    if stored is None or "refit" in method.options:
        if stored is not None:
            stored.check_windows({"seed": str(config.seed)})
        unread += _check_calibration(config, view, tokenizer)
    needed = bytes_needed(forecast.prediction, model.dtype)
    return Checked(config, view, tokenizer, forecast.lines, unread, needed)


def check_processes(trainer: TrainerConfig) -> None:
    """Refuse more processes than this machine can run."""
    if "RANK" not in os.environ and trainer.num_nodes == 1:
        check_number(trainer.devices)


def check_held_out(
    config: EvaluationConfig, view: DecoderView, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Check the held-out text; return its source if it is not read."""
    check_length(view, config.seqlen, "evaluation.seqlen")
    if config.source in HUB_CORPORA:
        check_corpus(config, "evaluation")
        return [config.source]
    check_vocabulary(view, evaluation_windows(config, tokenizer).input_ids)
    return []


def _check_calibration(
    config: CompressConfig, view: DecoderView, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Check the calibration text; return the sources that are not read."""
    check_length(view, config.calibration.seqlen, "calibration.seqlen")
    check_num_windows(config, config.trainer.devices * config.trainer.num_nodes)
    found = local_calibration_windows(config.calibration, tokenizer, config.seed)
    for _, windows in found:
        if windows is not None:
            check_vocabulary(view, windows.input_ids)
    return [source for source, windows in found if windows is None]


def finished_lines(root: Path) -> list[str]:
    """Return what a dry run says of a finished run."""
    return [
        f"{root} contains the finished run of this configuration.",
        "Dry run: nothing was written. The command would only print the results.",
    ]


def folder_lines(root: Path, state: RunState, needed: int, *, overwrite: bool) -> list[str]:
    """Return what would happen in the run folder."""
    lines = [f"The run would write about {needed / 1e6:.1f} MB to {root}."]
    if state == "unfinished":
        lines.append("The folder has an unfinished run of this configuration, which would resume.")
    if overwrite and (root / CONFIG).exists():
        lines.append("The earlier run in the folder would be deleted first.")
    return lines


def unchecked_line(unread: Sequence[str]) -> str:
    """Return what a dry run has not checked."""
    texts = f"; the text of {', '.join(sorted(set(unread)))}" if unread else ""
    return f"Dry run: nothing was written. Not checked: the values of the weights{texts}."
