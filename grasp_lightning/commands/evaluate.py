"""``evaluate``: perplexity, tasks and cost of models, side by side."""

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from grasp_lightning.commands.streamed import check_runs_alone
from grasp_lightning.commands.workflow import tracked_perplexity
from grasp_lightning.config import EvaluateConfig, EvaluationConfig, ModelConfig
from grasp_lightning.config.values import check_values
from grasp_lightning.data.section_windows import evaluation_windows
from grasp_lightning.data.sources import corpus_named
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, DataError, ModelError, OutputError
from grasp_lightning.evaluation.cost import measure_cost
from grasp_lightning.evaluation.harness import Harness, TaskSettings
from grasp_lightning.evaluation.machine import Machine, describe_machine
from grasp_lightning.evaluation.peak_memory import forget_peak, peak_bytes
from grasp_lightning.evaluation.results import CorpusResult, ModelEvaluation
from grasp_lightning.linalg.precision import matmul_precision
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import (
    LoadedModel,
    load_meta_model,
    load_model,
    model_hash,
    resolve_device,
)
from grasp_lightning.models.model_settings import all_settings, named_by
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.models.streamed_loading import check_streamable, load_streamed
from grasp_lightning.progress import track
from grasp_lightning.storage.amend import amend_run
from grasp_lightning.storage.results import (
    EvaluationFile,
    Request,
    Settings,
    merge_sections,
    stored_section,
)
from grasp_lightning.training.hidden_cache import DEFAULT_LIMIT
from grasp_lightning.training.sweep import sweep_logits, sweep_perplexity


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """A finished evaluation, by model: its file, if asked for, and the amended files of runs."""

    evaluations: Sequence[ModelEvaluation]
    output: Path | None
    amended: Sequence[Path]


def run_evaluate(config: EvaluateConfig) -> EvaluateRun:
    """Measure models one after the other, except for results that ``output`` contains already."""
    models = _check(config)
    corpora = {corpus: _corpus_config(corpus, config) for corpus in config.corpora}
    harness = None
    if config.tasks:
        harness = Harness(config.tasks, config.task_data, _task_settings(config))
    machine = describe_machine(torch.device(resolve_device(config.device)))
    request = Request(
        models=config.model,
        corpora=config.corpora,
        tasks=config.tasks,
        settings=_settings(config, harness, machine),
        overwrite=config.overwrite,
    )
    file = EvaluationFile(config.output, request, machine)
    evaluations, amended = [], []
    for model in models:
        with matmul_precision(config.matmul_precision):
            evaluation = _evaluate(model, config, corpora, harness, file)
        evaluations.append(evaluation)
        section = stored_section(evaluation, request.settings)
        changed = amend_run(model.path, "evaluation", section, merge_sections)
        amended += [] if changed is None else [changed]
    output = None if config.output is None else Path(config.output)
    return EvaluateRun(evaluations=evaluations, output=output, amended=amended)


def _check(config: EvaluateConfig) -> list[ModelConfig]:
    """Return how to load each model, after checks that need no weights."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("evaluate runs in a single process; start it without torchrun")
    check_values(config)
    _check_names(config)
    models = all_settings(config, config.model, ["model"] * len(config.model))
    for model in models:
        with named_by("model"):
            if model.loading == "streamed":
                check_streamable(model)
            view = DecoderView(load_meta_model(model))
            if config.corpora:
                check_length(view, config.evaluation.seqlen, "evaluation.seqlen")
    return models


def _check_names(config: EvaluateConfig) -> None:
    if not config.model:
        raise ConfigError("model is empty; name at least one model, as in --model=runs/x/model")
    for key in ("model", "corpora", "tasks"):
        names: tuple[str, ...] = getattr(config, key)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{key}: {twice[0]} is named twice")
    if config.task_data is not None and not config.tasks:
        raise ConfigError("task_data has no effect without tasks")


def _corpus_config(corpus: str, config: EvaluateConfig) -> EvaluationConfig:
    source = corpus_named(corpus, "corpora")
    return EvaluationConfig(**asdict(source), **asdict(config.evaluation))


def _settings(config: EvaluateConfig, harness: Harness | None, machine: Machine) -> Settings:
    """Return what results depend on besides model, corpus and task, by part."""
    tasks = asdict(_task_settings(config))
    return {
        "model": {
            "dtype": config.dtype,
            "revision": config.revision,
            "device": machine.device,
            "matmul_precision": config.matmul_precision,
        },
        "windows": {f"evaluation.{key}": v for key, v in asdict(config.evaluation).items()},
        "tasks": tasks if harness is None else {**tasks, **harness.fingerprint},
    }


def _task_settings(config: EvaluateConfig) -> TaskSettings:
    return TaskSettings(
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _evaluate(
    model: ModelConfig,
    config: EvaluateConfig,
    corpora: Mapping[str, EvaluationConfig],
    harness: Harness | None,
    file: EvaluationFile,
) -> ModelEvaluation:
    with named_by("model"):
        loaded, digest = _load(model)
    evaluation = file.get(model.path, digest)
    texts = {corpus: _windows(loaded, options) for corpus, options in corpora.items()}
    for corpus, windows in texts.items():
        stored = evaluation.corpora.get(corpus)
        if stored is not None and stored.windows_sha256 != windows.sha256:
            raise OutputError(
                f"output: {config.output} contains the perplexity on an earlier version of "
                f"{corpus}; name another file, or measure again with --overwrite"
            )
    can_forget = forget_peak(loaded.model.device)
    try:
        for extended in _measurements(evaluation, config, loaded, texts, harness):
            evaluation = extended
            if can_forget:
                peak = max(evaluation.peak_memory_bytes or 0, peak_bytes(loaded.model.device))
                evaluation = replace(evaluation, peak_memory_bytes=peak)
            file.put(evaluation)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device has too little memory to evaluate {model.path}; lower batch_size, "
            "evaluation.batch_size or evaluation.seqlen"
        ) from error
    del loaded
    gc.collect()  # modules and their hooks are cycles
    return evaluation


def _load(model: ModelConfig) -> tuple[LoadedModel, str]:
    """Return a model and the hash of its weights."""
    if model.loading == "whole":
        loaded = load_model(model)
        return loaded, model_hash(loaded.model)
    loaded, digest = load_streamed(model, may_be_compressed=True)
    check_runs_alone(DecoderView(loaded.model))
    return loaded, digest


def _measurements(
    evaluation: ModelEvaluation,
    config: EvaluateConfig,
    loaded: LoadedModel,
    texts: Mapping[str, TokenWindows],
    harness: Harness | None,
) -> Iterator[ModelEvaluation]:
    view, name = DecoderView(loaded.model), evaluation.model
    if evaluation.cost is None:
        evaluation = replace(evaluation, cost=measure_cost(view, loaded.origin.source_bytes))
        yield evaluation
    for corpus, windows in texts.items():
        if corpus not in evaluation.corpora:
            result = _perplexity(view, windows, config.evaluation.batch_size, f"{name}: {corpus}")
            evaluation = replace(evaluation, corpora={**evaluation.corpora, corpus: result})
            yield evaluation
    for task in config.tasks:
        if harness is not None and task not in evaluation.tasks:
            predict = partial(_streamed_logits, view, f"{name}: {task}")
            is_streamed = streamed_weights(loaded.model) is not None
            run = harness.run(
                loaded.model, loaded.tokenizer, task, predict if is_streamed else None
            )
            evaluation = replace(evaluation, tasks={**evaluation.tasks, task: run})
            yield evaluation


def _windows(loaded: LoadedModel, options: EvaluationConfig) -> TokenWindows:
    windows = evaluation_windows(options, loaded.tokenizer)
    if windows.num_tokens < options.seqlen:
        raise DataError(
            f"evaluation.seqlen is {options.seqlen}, but {options.path or options.source} has only "
            f"{windows.num_tokens} tokens; lower evaluation.seqlen, or use a longer text"
        )
    check_vocabulary(DecoderView(loaded.model), windows.input_ids)
    return windows


def _perplexity(
    view: DecoderView, windows: TokenWindows, batch_size: int, description: str
) -> CorpusResult:
    start = time.perf_counter()
    if streamed_weights(view.model) is None:
        perplexity = tracked_perplexity(view, windows, batch_size, description, _console())
    else:
        perplexity = sweep_perplexity(
            view,
            windows,
            batch_size,
            max_bytes=DEFAULT_LIMIT,
            track=partial(track, console=_console()),
            description=description,
        )
    return CorpusResult(
        perplexity=perplexity,
        num_tokens=windows.num_targets,
        num_windows=len(windows),
        windows_sha256=windows.sha256,
        seconds=time.perf_counter() - start,
    )


def _streamed_logits(
    view: DecoderView, description: str, inputs: Sequence[Tensor]
) -> Iterator[Tensor]:
    shown = partial(track, console=_console())
    return sweep_logits(view, inputs, max_bytes=DEFAULT_LIMIT, track=shown, description=description)


def _console() -> Console:
    return Console(stderr=True)  # standard output is for the result
