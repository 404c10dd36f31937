"""What a finished compensation writes into its run folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from callbacks.history import TrainingHistory
from grasp_lightning.commands.outputs import package_versions
from grasp_lightning.config import CompensateConfig
from grasp_lightning.config.compensate_settings import uses_instructions
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.sources import source_licence
from grasp_lightning.evaluation.phases import Phases, peak_memory_bytes
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.verification import verify_saved
from grasp_lightning.reporting.card import base_model_of
from grasp_lightning.reporting.compensation import render_compensation_report
from grasp_lightning.reporting.compensation_card import compensated_card
from grasp_lightning.reporting.compensation_metrics import (
    Change,
    CompensationMetrics,
    CompensationSeconds,
    History,
    ParameterCounts,
)
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.training.compensation import CompensationModule

_CARD_NAME = "README.md"
_PHASES = ("load", "train", "evaluate", "save", "verify")


@dataclass(frozen=True, kw_only=True)
class CompensationOutcome:
    """What a compensation leads to, before it is written.

    Attributes:
        config: The resolved configuration.
        loaded: The trained model, adapters merged, its tokenizer and its origin.
        data: What it was trained on.
        module: What was trained.
        history: Losses of all steps.
        best_step: Steps that led to the weights that are kept; None if the last ones are.
        parameters_before: Parameters of the model before training.
        perplexity: On held-out text.
        perplexity_tokens: Number of predicted tokens behind each perplexity.
        validation_loss: On samples that were set aside; None if there are none.
        generates: Whether the model generated with its cache before it was trained.
    """

    config: CompensateConfig
    loaded: LoadedModel
    data: TrainingData
    module: CompensationModule
    history: TrainingHistory
    best_step: int | None
    parameters_before: int
    perplexity: Change[float | None]
    perplexity_tokens: int
    validation_loss: Change[float | None]
    generates: bool = True


def write_compensation(
    run: RunFolder, outcome: CompensationOutcome, phases: Phases
) -> CompensationMetrics:
    """Write model, metrics and report.

    Args:
        run: The run folder.
        outcome: What was done.
        phases: Times so far; saving and verifying are added.

    Returns:
        The metrics as written.
    """
    card = _read_card(outcome.loaded)
    with phases("save", excluding=("verify",)):
        _write_model(run, outcome, phases, card)
    metrics = _metrics(outcome, card, phases)
    run.write_text("report.html", render_compensation_report(metrics, to_dict(outcome.config)))
    run.write_json("metrics.json", metrics.to_dict())
    return metrics


def _read_card(loaded: LoadedModel) -> str | None:
    folder = loaded.origin.folder
    file = None if folder is None else folder / _CARD_NAME
    if file is None or not file.is_file():
        return None
    return file.read_text(encoding="utf-8", errors="replace")


def _write_model(
    run: RunFolder, outcome: CompensationOutcome, phases: Phases, card: str | None
) -> None:
    origin, metrics = outcome.loaded.origin, _metrics(outcome, card, phases)
    text = compensated_card(
        card,
        metrics,
        base_model=metrics.model,
        licence=origin.licence,
        licence_files=[file.name for file in origin.licence_files],
        config=to_dict(outcome.config),
    )
    with run.new_folder("model") as folder:
        save_model(outcome.loaded.model, folder, tokenizer=outcome.loaded.tokenizer)
        for file in origin.licence_files:
            shutil.copyfile(file, folder / file.name)
        (folder / _CARD_NAME).write_text(text, encoding="utf-8")
        with phases("verify"):
            verify_saved(outcome.loaded.model, folder, generates=outcome.generates)


def _metrics(outcome: CompensationOutcome, card: str | None, phases: Phases) -> CompensationMetrics:
    loaded, config, samples = outcome.loaded, outcome.config, outcome.data.samples
    assert outcome.module.trained is not None  # it was trained
    after = count_parameters(loaded.model)
    item, steps = loaded.model.dtype.itemsize, outcome.history.steps
    data, licence = _describe_data(config)
    return CompensationMetrics(
        model=base_model_of(card or "") or loaded.origin.name,
        train=config.train,
        objective=config.objective,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        parameters=ParameterCounts(
            before=outcome.parameters_before,
            after=after,
            trainable=outcome.module.trained.num_parameters,
        ),
        bytes=Change(before=outcome.parameters_before * item, after=after * item),
        perplexity=outcome.perplexity,
        perplexity_tokens=outcome.perplexity_tokens,
        validation_loss=outcome.validation_loss,
        validation_tokens=samples.validation.num_targets or None,
        steps=len(steps),
        best_step=outcome.best_step,
        epochs=len(steps) / outcome.data.steps().steps_per_epoch,
        samples=samples.counts,
        trained_tokens=outcome.module.num_trained_tokens,
        data=data,
        data_licence=licence,
        history=History(
            steps=tuple(range(1, len(steps) + 1)),
            loss=tuple(loss for loss, _ in steps),
            learning_rate=tuple(rate for _, rate in steps),
            validation_steps=tuple(step for step, _ in outcome.history.validations),
            validation_loss=tuple(loss for _, loss in outcome.history.validations),
        ),
        seconds=CompensationSeconds(
            **{name: phases.seconds.get(name) for name in _PHASES},
            total=phases.total,
        ),
        peak_memory_bytes=peak_memory_bytes(),
        versions=package_versions("peft"),
    )


def _describe_data(config: CompensateConfig) -> tuple[str, str | None]:
    """Return what was learned from in words, without a path, and its licence."""
    section = config.data if uses_instructions(config) else config.text
    if section.source == "file":
        return Path(section.path or "").name, section.licence
    if uses_instructions(config):
        hub = HUB_INSTRUCTIONS[section.source]
        return f"{section.source} ({hub.repository})", section.licence or hub.licence
    return section.source, section.licence or source_licence(section.source)
