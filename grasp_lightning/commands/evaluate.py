"""``evaluate``: perplexity, tasks and cost of models, side by side."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from grasp_lightning.commands.amend import amend_run
from grasp_lightning.commands.evaluation_file import EvaluationFile, stored_section
from grasp_lightning.config import EvaluateConfig, EvaluationConfig, ModelConfig
from grasp_lightning.data.sources import SOURCES
from grasp_lightning.data.windows import (
    TokenWindows,
    batches,
    check_window_options,
    evaluation_windows,
)
from grasp_lightning.errors import ConfigError, DataError, ModelError
from grasp_lightning.evaluation.cost import measure_cost
from grasp_lightning.evaluation.harness import Harness, TaskSettings
from grasp_lightning.evaluation.machine import describe_machine
from grasp_lightning.evaluation.memory import forget_peak, peak_bytes
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.evaluation.results import CorpusResult, ModelEvaluation
from grasp_lightning.models.calls import check_length, check_vocabulary
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, model_hash, resolve_device
from grasp_lightning.models.source import resolve_source

_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_FILE = "file"


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """A finished evaluation.

    Attributes:
        evaluations: What was measured, by model in the order given.
        output: The JSON file; None if none was asked for.
        amended: Files of runs that the measurements were added to.
    """

    evaluations: Sequence[ModelEvaluation]
    output: Path | None
    amended: Sequence[Path]


def run_evaluate(config: EvaluateConfig) -> EvaluateRun:
    """Measure models as a configuration says.

    What ``output`` holds already is not measured again. Models are loaded one after the other.
    Whatever a user can cause is a ``GraspError``.

    Args:
        config: What the user set.

    Returns:
        The measurements.
    """
    _check(config)
    corpora = {corpus: _corpus_config(corpus, config) for corpus in config.corpora}
    settings = _settings(config)
    harness = _harness(config)
    machine = describe_machine(torch.device(resolve_device(config.device)))
    file = EvaluationFile(config.output, settings, machine, overwrite=config.overwrite)
    evaluations, amended = [], []
    for model in config.model:
        evaluations.append(_evaluate(model, config, corpora, harness, file))
        changed = amend_run(model, "evaluation", stored_section(evaluations[-1], settings))
        amended += [] if changed is None else [changed]
    output = None if config.output is None else Path(config.output)
    return EvaluateRun(evaluations=evaluations, output=output, amended=amended)


def _check(config: EvaluateConfig) -> None:
    if not config.model:
        raise ConfigError("model is empty; name at least one model, as in --model=runs/x/model")
    for key in ("model", "corpora", "tasks"):
        names: tuple[str, ...] = getattr(config, key)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{key}: {twice[0]} is named twice")
    if config.task_data is not None and not config.tasks:
        raise ConfigError("task_data has no effect without tasks")
    for model in config.model:
        resolve_source(_model_config(model, config))


def _model_config(model: str, config: EvaluateConfig) -> ModelConfig:
    return ModelConfig(
        path=model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _corpus_config(corpus: str, config: EvaluateConfig) -> EvaluationConfig:
    is_file = Path(corpus).suffix.lower() in _FILE_SUFFIXES
    names = [source for source in SOURCES if source != _FILE]
    if not is_file and corpus not in names:
        raise ConfigError(
            f"corpora: expected {', '.join(names)}, or a file ({', '.join(_FILE_SUFFIXES)}), got "
            f"{corpus!r}"
        )
    windows = EvaluationConfig(
        source=_FILE if is_file else corpus,
        path=corpus if is_file else None,
        **asdict(config.evaluation),
    )
    check_window_options(windows, "evaluation")
    return windows


def _settings(config: EvaluateConfig) -> dict[str, Any]:  # Any: values of JSON
    """Return what results depend on beside model, corpus and task."""
    windows = {f"evaluation.{key}": value for key, value in asdict(config.evaluation).items()}
    keys = ("revision", "dtype", "task_data", "limit", "num_fewshot", "batch_size", "seed")
    return {**{key: getattr(config, key) for key in keys}, **windows}


def _harness(config: EvaluateConfig) -> Harness | None:
    if not config.tasks:
        return None
    settings = TaskSettings(
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    return Harness(config.tasks, config.task_data, settings)


def _evaluate(
    model: str,
    config: EvaluateConfig,
    corpora: Mapping[str, EvaluationConfig],
    harness: Harness | None,
    file: EvaluationFile,
) -> ModelEvaluation:
    """Load one model and measure what is missing."""
    loaded = load_model(_model_config(model, config))
    evaluation = file.get(model, model_hash(loaded.model))
    forget_peak(loaded.model.device)
    try:
        for extended in _measurements(evaluation, config, loaded, corpora, harness):
            file.put(extended)
            evaluation = extended
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device has too little memory to evaluate {model}; lower batch_size, "
            "evaluation.batch_size or evaluation.seqlen"
        ) from error
    del loaded
    gc.collect()  # modules and their hooks are cycles
    return evaluation


def _measurements(
    evaluation: ModelEvaluation,
    config: EvaluateConfig,
    loaded: LoadedModel,
    corpora: Mapping[str, EvaluationConfig],
    harness: Harness | None,
) -> Iterator[ModelEvaluation]:
    """Yield the evaluation after each measurement that was missing."""
    view, name = DecoderView(loaded.model), evaluation.model
    # All texts first: one that does not fit is told before hours of work.
    windows = {
        corpus: _windows(view, loaded, options)
        for corpus, options in corpora.items()
        if corpus not in evaluation.corpora
    }
    if evaluation.cost is None:
        evaluation = replace(evaluation, cost=measure_cost(view, loaded.origin.source_bytes))
        yield evaluation
    for corpus, texts in windows.items():
        result = _perplexity(view, texts, config.evaluation.batch_size, f"{name}: {corpus}")
        evaluation = replace(
            evaluation,
            corpora={**evaluation.corpora, corpus: result},
            peak_memory_bytes=_peak(evaluation, loaded),
        )
        yield evaluation
    for task in config.tasks:
        if harness is not None and task not in evaluation.tasks:
            run = harness.run(loaded.model, loaded.tokenizer, task)
            evaluation = replace(
                evaluation,
                tasks={**evaluation.tasks, task: run},
                peak_memory_bytes=_peak(evaluation, loaded),
            )
            yield evaluation


def _windows(view: DecoderView, loaded: LoadedModel, options: EvaluationConfig) -> TokenWindows:
    check_length(view, options.seqlen, "evaluation")
    windows = evaluation_windows(options, loaded.tokenizer)
    if windows.num_tokens < options.seqlen:
        raise DataError(
            f"evaluation.seqlen is {options.seqlen}, but {options.path or options.source} has only "
            f"{windows.num_tokens} tokens; lower evaluation.seqlen, or use a longer text"
        )
    check_vocabulary(view, windows.input_ids)
    return windows


def _perplexity(
    view: DecoderView, windows: TokenWindows, batch_size: int, description: str
) -> CorpusResult:
    start = time.perf_counter()
    stream = track(
        batches(windows, batch_size),
        total=-(-len(windows) // batch_size),
        description=description,
        console=Console(stderr=True),  # standard output is for the result
    )
    return CorpusResult(
        perplexity=evaluate_perplexity(view, stream),
        num_tokens=windows.num_targets,
        num_windows=len(windows),
        windows_sha256=windows.sha256,
        seconds=time.perf_counter() - start,
    )


def _peak(evaluation: ModelEvaluation, loaded: LoadedModel) -> int:
    return max(evaluation.peak_memory_bytes or 0, peak_bytes(loaded.model.device))
