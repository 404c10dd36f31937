"""What a finished run writes into its folder."""

import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from grasp_lightning import __version__
from grasp_lightning.commands.stages import SAVE
from grasp_lightning.commands.training import TrainingSummary
from grasp_lightning.config import CompensateConfig, TextConfig
from grasp_lightning.config.compensate_settings import uses_instructions
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.mixture import SELF, mixture_parts, section_of
from grasp_lightning.data.sources import source_licence
from grasp_lightning.errors import OutputError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods.targets import read_target_losses
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.size import ModelSize, count_parameters
from grasp_lightning.plan import Plan
from grasp_lightning.reading.on_access import OnAccess
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import to_plain
from grasp_lightning.reporting.card import base_model_of, compensated_card, model_card
from grasp_lightning.reporting.linears import layer_changes, predicted_losses
from grasp_lightning.reporting.metrics import (
    Change,
    CompensationMetrics,
    CompensationSeconds,
    DecoderLinears,
    FirstStage,
    History,
    LossChange,
    Metrics,
    Pair,
    ParameterCounts,
    RunMetrics,
    Seconds,
)
from grasp_lightning.reporting.page import render_compensation_report, render_report
from grasp_lightning.reporting.servers import Servers
from grasp_lightning.reporting.trimming import TrimFacts
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import COMPRESSED, METRICS, PLAN, TRIM
from grasp_lightning.storage.model_folder import VERIFY, read_card, write_model
from grasp_lightning.storage.shards import KeptShards
from grasp_lightning.storage.tensor_files import write_tensors

M = TypeVar("M", bound=RunMetrics)
S = TypeVar("S", Seconds, CompensationSeconds)

_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "safetensors")


@dataclass(frozen=True, kw_only=True)
class RunOutcome(ABC, Generic[M]):
    """The result of a run, before it is written."""

    loaded: LoadedModel
    perplexity_tokens: int
    generates: bool = True

    @abstractmethod
    def metrics(self, phases: Phases) -> M:
        """Return the numbers, with the times so far."""

    @abstractmethod
    def card(self, metrics: M) -> str:
        """Return the model card."""

    @abstractmethod
    def report(self, metrics: M) -> str:
        """Return the report page."""

    def write_decisions(self, run: RunFolder) -> None:
        """Write the data that the model was made from, if there is any."""


@dataclass(frozen=True, kw_only=True)
class Outcome(RunOutcome[Metrics]):
    """The result of a compression.

    Attributes:
        scores: Content of scores.safetensors.
        factors: ``<module>.left`` and ``<module>.right`` of low-rank linears, and
            ``<module>.weight`` of the readers of narrowed MLPs and of sparse linears.
        num_inputs: Inputs of every linear in decoder layers of the dense model.
        settings: The resolved configuration as plain values.
        trim: What trimming the vocabulary removed, if it did.
    """

    plan: Plan
    scores: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    num_inputs: Mapping[str, int]
    sizes: Pair[ModelSize]
    perplexity: Pair[float | None]
    settings: Mapping[str, Any]  # Any: values of YAML
    trim: TrimFacts | None = None

    def metrics(self, phases: Phases) -> Metrics:
        """Return the numbers, with the times so far."""
        dense, compressed = self.sizes.values

        def pair(size: str) -> Pair[int]:
            return Pair(dense=getattr(dense, size), compressed=getattr(compressed, size))

        predicted = predicted_losses(self.plan, self.scores)
        before, after = self.perplexity.values
        return Metrics(
            model=self.loaded.origin.name,
            method=self.plan.method,
            dtype=_dtype(self.loaded),
            layers=self.plan.selected_layers or self.plan.dropped_layers,
            layer_changes=layer_changes(self.plan, self.num_inputs),
            removed_ratio=1 - compressed.parameters / dense.parameters,
            zero_ratio=self.plan.zeros / dense.parameters,
            parameters=pair("parameters"),
            bytes=pair("bytes"),
            decoder_linears=DecoderLinears(
                parameters=pair("decoder_linear_parameters"), bytes=pair("decoder_linear_bytes")
            ),
            channels={
                reader: Pair(dense=self.num_inputs[reader], compressed=kept)
                for reader, kept in self.plan.channels.items()
            },
            experts={
                name: Pair(dense=total, compressed=kept)
                for name, (kept, total) in self.plan.experts.items()
            },
            heads={
                name: Pair(dense=total, compressed=kept)
                for name, (kept, total) in self.plan.heads.items()
            },
            vocabulary=None if self.trim is None else self.trim.change,
            source_bytes=self.loaded.origin.source_bytes,
            perplexity=self.perplexity,
            perplexity_tokens=self.perplexity_tokens,
            loss_change=LossChange(
                predicted=sum(predicted.values()) if predicted else None,
                measured=math.log(after / before) if before and after else None,
            ),
            target_losses=read_target_losses(self.scores),
            seconds=_seconds(Seconds, phases),
            peak_memory_bytes=phases.peak_memory_bytes,
            versions=package_versions(),
        )

    def card(self, metrics: Metrics) -> str:
        """Return the model card."""
        origin = self.loaded.origin
        return model_card(
            metrics,
            self.plan,
            origin_name=origin.name,
            licence=origin.licence,
            licence_files=[file.name for file in origin.licence_files],
            config=self.settings,
            servers=Servers.of(self.loaded.model),
        )

    def report(self, metrics: Metrics) -> str:
        """Return the report page."""
        return render_report(metrics, self.plan, self.scores, self.settings)

    def write_decisions(self, run: RunFolder) -> None:
        """Write scores, factors and plan, and what trimming the vocabulary removed."""
        if self.trim is not None:
            run.write_json(TRIM, to_plain(self.trim))
        _write_tensors(run, "scores.safetensors", self.scores, torch.float32)
        _write_tensors(run, "factors.safetensors", self.factors, self.loaded.model.dtype)
        run.write_text(PLAN, self.plan.to_json())


@dataclass(frozen=True, kw_only=True)
class CompensationOutcome(RunOutcome[CompensationMetrics]):
    """The result of a compensation.

    Attributes:
        loaded: The model, with adapters merged.
        plan: What the trained model was compressed with, if that is known.
        compression: Metrics of the compression in the same run folder, if there is one.
    """

    config: CompensateConfig
    data: TrainingData
    training: TrainingSummary
    plan: Plan | None
    parameters_before: int
    perplexity: Change[float | None]
    validation_loss: Change[float | None]
    compression: Metrics | None = None

    @cached_property
    def source_card(self) -> str | None:
        """Card of the compressed model, if it has one."""
        return read_card(self.loaded.origin.folder)

    def metrics(self, phases: Phases) -> CompensationMetrics:
        """Return the numbers, with the times so far."""
        config, training = self.config, self.training
        history = training.history
        steps = history.steps
        before, after = self.parameters_before, count_parameters(self.loaded.model)
        item = self.loaded.model.dtype.itemsize
        data, licence = _describe_data(config)
        return CompensationMetrics(
            model=base_model_of(self.source_card or "") or self.loaded.origin.name,
            train=config.train,
            objective=config.objective,
            dtype=_dtype(self.loaded),
            parameters=ParameterCounts(
                before=before, after=after, trainable=training.num_parameters
            ),
            bytes=Change(before=before * item, after=after * item),
            perplexity=self.perplexity,
            perplexity_tokens=self.perplexity_tokens,
            validation_loss=self.validation_loss,
            validation_tokens=training.validation_tokens or None,
            layer_errors=training.layer_errors,
            steps=len(steps),
            time_limit=training.time_limit,
            best_step=training.best_step,
            epochs=training.epochs,
            samples=self.data.samples.counts,
            trained_tokens=training.num_tokens,
            tokens_per_second=history.median_speed,
            data=data,
            data_licence=licence,
            history=History(
                steps=tuple(range(1, len(steps) + 1)),
                loss=tuple(loss for loss, _ in steps),
                learning_rate=tuple(rate for _, rate in steps),
                validation_steps=tuple(step for step, _ in history.validations),
                validation_loss=tuple(loss for _, loss in history.validations),
            ),
            compression=_first_stage(self.compression, item),
            seconds=_seconds(CompensationSeconds, phases),
            peak_memory_bytes=phases.peak_memory_bytes,
            versions=package_versions("peft"),
        )

    def card(self, metrics: CompensationMetrics) -> str:
        """Return the model card."""
        origin = self.loaded.origin
        return compensated_card(
            self.source_card,
            metrics,
            base_model=metrics.model,
            licence=origin.licence,
            licence_files=[file.name for file in origin.licence_files],
            config=to_dict(self.config),
            servers=Servers.of(self.loaded.model),
        )

    def report(self, metrics: CompensationMetrics) -> str:
        """Return the report page."""
        return render_compensation_report(metrics, to_dict(self.config))

    def write_decisions(self, run: RunFolder) -> None:
        """Write the plan of the compression, so that a later training finds it."""
        if self.plan is not None:
            run.write_text(PLAN, self.plan.to_json())


def write_outputs(
    run: RunFolder, outcome: RunOutcome[M], phases: Phases, shards: KeptShards | None = None
) -> M:
    """Write model, decisions, report and metrics; return the metrics as written.

    ``shards`` keeps the weight files of a streamed model for a later start.
    """
    with phases(SAVE, excluding=(VERIFY,)):
        card, generates = outcome.card(outcome.metrics(phases)), outcome.generates
        write_model(run, outcome.loaded, card, generates=generates, phases=phases, shards=shards)
        outcome.write_decisions(run)
    metrics = outcome.metrics(phases)
    run.write_text("report.html", outcome.report(metrics))
    run.write_json("metrics.json", metrics.to_dict())
    return metrics


def read_compression(run: RunFolder) -> Metrics:
    """Return the metrics of the finished compression inside a run folder."""
    return Metrics.from_dict(read_json(run.path(f"{COMPRESSED}/{METRICS}"), OutputError))


def _first_stage(metrics: Metrics | None, itemsize: int) -> FirstStage | None:
    if metrics is None:
        return None
    dense, compressed = metrics.parameters.values
    return FirstStage(
        method=metrics.method,
        removed_ratio=metrics.removed_ratio,
        parameters=metrics.parameters,
        bytes=Pair(dense=dense * itemsize, compressed=compressed * itemsize),
        perplexity=metrics.perplexity,
        seconds=metrics.seconds.total,
        peak_memory_bytes=metrics.peak_memory_bytes,
    )


def package_versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages behind a run, including ``more``."""
    packages = {package: version(package) for package in (*_PACKAGES, *more)}
    return {"grasp_lightning": __version__, "python": platform.python_version(), **packages}


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")


def _seconds(kind: type[S], phases: Phases) -> S:
    times = {phase.name: phases.seconds.get(phase.name) for phase in fields(kind)}
    return kind(**{**times, "total": phases.total})


def _describe_data(config: CompensateConfig) -> tuple[str, str | None]:
    """Return the training data in words, without a path, and its licence."""
    if not uses_instructions(config):
        return _describe_text(config.text)
    section = config.data
    if section.source == "file":
        return Path(section.path or "").name, section.licence
    hub = HUB_INSTRUCTIONS[section.source]
    return f"{section.source} ({hub.repository})", section.licence or hub.licence


def _describe_text(text: TextConfig) -> tuple[str, str | None]:
    """Return the sources in words, and their licences if all are known.

    Text of the dense model has none of its own.
    """
    names, licences = [], []
    for part in mixture_parts(section_of(text), "text"):
        names.append(part.source if part.path is None else Path(part.path).name)
        if part.source != SELF:
            named = source_licence(part.source)
            licences.append(text.licence if part.path is not None else text.licence or named)
    known = [licence for licence in dict.fromkeys(licences) if licence is not None]
    return ", ".join(names), "; ".join(known) if known and None not in licences else None


def _write_tensors(
    run: RunFolder, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write tensors, if any: a method that only drops layers has none."""
    if tensors:
        stored = OnAccess({key: partial(_cast, tensors, key, dtype) for key in tensors})
        run.write_with(name, lambda path: write_tensors(path, stored))


def _cast(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    return tensors[key].to(dtype)
