"""``benchmark``: throughput and memory of models, measured alternately in one process."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from grasp_lightning.config import BenchmarkConfig, ModelConfig
from grasp_lightning.config.values import check_values
from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.machine import describe_machine
from grasp_lightning.evaluation.own_process import measure_peak_memory
from grasp_lightning.evaluation.throughput import ModelThroughput, Throughput, measure_throughput
from grasp_lightning.evaluation.workload import Workload
from grasp_lightning.models.calls import vocabulary_size
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.device import resolve_device
from grasp_lightning.models.loading import load_meta_model, load_model
from grasp_lightning.models.model_settings import all_settings, named_by
from grasp_lightning.models.size import count_parameters
from grasp_lightning.reporting.throughput import write_throughput_plot
from grasp_lightning.run_folder import write_file
from grasp_lightning.storage.amend import amend_run
from grasp_lightning.storage.results import ResultFiles

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRun:
    """A finished benchmark: its files, if any were asked for, and the amended files of runs."""

    result: Throughput
    output: Path | None
    plot: Path | None
    amended: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """One of the measured models: its name, its key in the configuration, and how to load it."""

    name: str
    key: str
    settings: ModelConfig
    is_control: bool = False


def run_benchmark(config: BenchmarkConfig) -> BenchmarkRun:
    """Measure models and write the result if a file is named; user errors are a ``GraspError``."""
    _check_numbers(config)
    files = None if config.output is None else ResultFiles(config.output, config.overwrite)
    variants = _variants(config)
    workload = _workload(config, variants)
    with _torch_threads(config.threads):
        result = _measure(variants, workload)
    output = plot = None
    if files is not None:
        output, plot = files.output, files.plot
        text = json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
        write_file(output, lambda path: path.write_text(text, encoding="utf-8"))
        write_file(plot, lambda path: write_throughput_plot(result, path))
    return BenchmarkRun(result=result, output=output, plot=plot, amended=_amend(config, result))


def _amend(config: BenchmarkConfig, result: Throughput) -> list[Path]:
    """Add the result to the metrics of the models' runs; return the changed files."""
    models = [model.name for model in result.models if not model.is_control]
    changed = [
        amend_run(path, "throughput", {**result.to_dict(), "model": name})
        for path, name in zip((config.model, *config.against), models, strict=True)
    ]
    return [file for file in changed if file is not None]


def variant_names(paths: Sequence[str]) -> list[str]:
    """Return distinct names of models for a table: their paths, or their distinguishing parts.

    ``runs/x/model`` and ``runs/y/model``, which have the same last part, become ``x`` and ``y``.
    """
    names = list(paths)
    for last, count in Counter(PurePath(path).name for path in paths).items():
        alike = [i for i, path in enumerate(paths) if PurePath(path).name == last]
        short = _what_differs([PurePath(paths[i]).parts for i in alike])
        others = {name for i, name in enumerate(names) if i not in alike}
        if count > 1 and all(short) and others.isdisjoint(short):
            for i, name in zip(alike, short, strict=True):
                names[i] = name
    return names


def _what_differs(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return paths without their common first and last components."""
    start = _num_common(paths)
    end = _num_common([path[start:][::-1] for path in paths])
    return ["/".join(path[start : len(path) - end]) for path in paths]


def _num_common(paths: Sequence[Sequence[str]]) -> int:
    """Return the number of equal components at the start of all paths."""
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return sum(1 for _ in alike)


def _check_numbers(config: BenchmarkConfig) -> None:
    for key in ("prefill_lengths", "decode_batch_sizes"):
        values: Sequence[int] = getattr(config, key)
        if not values:
            raise ConfigError(f"{key} is empty; expected a list of numbers such as [1, 4]")
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"{key} contains {value} more than once")
    check_values(config)
    cores = os.cpu_count() or 1
    if config.threads is not None and config.threads > cores:
        raise ConfigError(f"threads is {config.threads}, but this machine has {cores} cores")


def _variants(config: BenchmarkConfig) -> tuple[_Variant, ...]:
    """Return the models in the order of the tables: the first, its control, the others."""
    paths = (config.model, *config.against)
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise ConfigError(
            f"against: {twice} is given more than once; the first model is always measured twice, "
            "as a control"
        )
    keys = ("model", *("against" for _ in config.against))
    settings = all_settings(config, paths, keys)
    first, *others = (
        _Variant(name=name, key=key, settings=one)
        for name, key, one in zip(variant_names(paths), keys, settings, strict=True)
    )
    control = _Variant(
        name=f"{first.name} (again)", key="model", settings=first.settings, is_control=True
    )
    return (first, control, *others)


def _workload(config: BenchmarkConfig, variants: Sequence[_Variant]) -> Workload:
    """Return what to run, after checking that it fits the config of every model."""
    with named_by("model"):
        resolve_device(config.device)
    vocabularies = []
    for variant in variants:
        with named_by(variant.key):
            model = DecoderView(load_meta_model(variant.settings)).model
        _check_positions(config, variant.name, model)
        vocabularies.append(vocabulary_size(model))
    return Workload(
        prefill_lengths=config.prefill_lengths,
        decode_batch_sizes=config.decode_batch_sizes,
        prompt_length=config.prompt_length,
        new_tokens=config.new_tokens,
        num_rounds=config.rounds,
        seed=config.seed,
        vocabulary=min(vocabularies),
    )


def _check_positions(config: BenchmarkConfig, name: str, model: PreTrainedModel) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return
    longest = max(config.prefill_lengths)
    if longest > positions:
        raise ConfigError(
            f"prefill_lengths has {longest}, but {name} has only {positions} positions; remove it"
        )
    if config.prompt_length + config.new_tokens > positions:
        raise ConfigError(
            f"prompt_length {config.prompt_length} and new_tokens {config.new_tokens} need "
            f"{config.prompt_length + config.new_tokens} positions, but {name} has {positions}"
        )


def _measure(variants: Sequence[_Variant], workload: Workload) -> Throughput:
    threads = torch.get_num_threads()
    memory = {}
    # Before this process loads models itself: the GPU needs room.
    for variant in _track(variants, "peak memory"):
        with named_by(variant.key):
            memory[variant.name] = measure_peak_memory(variant.settings, workload, threads)
    models = {}
    for variant in variants:
        with named_by(variant.key):
            models[variant.name] = load_model(variant.settings).model
    timings = measure_throughput(models, workload, _track)
    return Throughput(
        workload=workload,
        machine=describe_machine(models[variants[0].name].device),
        models=tuple(
            ModelThroughput(
                name=variant.name,
                is_control=variant.is_control,
                parameters=count_parameters(models[variant.name]),
                dtype=str(models[variant.name].dtype).removeprefix("torch."),
                peak_memory=memory[variant.name],
                timings=timings[variant.name],
            )
            for variant in variants
        ),
    )


@contextmanager
def _torch_threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _track(items: Sequence[T], description: str) -> Iterable[T]:
    # On standard error: standard output is for the result. Updated between items only: a thread
    # that draws would disturb the measurement.
    console = Console(stderr=True)
    return track(items, description=description, console=console, auto_refresh=False)
