"""What the processes of a grid do, other than to compress and to train: ``WORK FILE``.

The file has the request as JSON. Bad input is one line and exit code 2, as for the commands.
"""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from grasp_lightning.comparison.grid import renamed
from grasp_lightning.comparison.measurements import Keyed, Measurements, Speed
from grasp_lightning.config import (
    EvaluationConfig,
    MatmulPrecision,
    ModelConfig,
    SpeedConfig,
    TasksConfig,
)
from grasp_lightning.data.section_windows import evaluation_windows
from grasp_lightning.data.windows import TokenWindows, batches
from grasp_lightning.errors import GraspError, OutputError
from grasp_lightning.evaluation.cost import measure_cost
from grasp_lightning.evaluation.harness import Harness, TaskSettings
from grasp_lightning.evaluation.machine import processor_name
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.evaluation.results import CorpusResult
from grasp_lightning.evaluation.throughput import Timing, Turn, measure_throughput
from grasp_lightning.evaluation.workload import Workload
from grasp_lightning.launch import end_with_parent
from grasp_lightning.models.calls import check_length, check_vocabulary, vocabulary_size
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, load_without_weights
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type, to_plain
from grasp_lightning.run_folder import write_file

_BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a model as a folder that loads fast, unless it is there.

    Attributes:
        folder: The folder.
    """

    model: ModelConfig
    folder: str


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure what a file of measurements lacks.

    Attributes:
        file: The file.
        key: Of the model.
        texts: Texts by name.
        text_keys: Key of each.
        task_keys: Key of each task to run.
        matmul_precision: How torch rounds the inputs of float32 matrix products.
    """

    model: ModelConfig
    file: str
    key: str
    texts: Mapping[str, EvaluationConfig]
    text_keys: Mapping[str, str]
    tasks: TasksConfig
    task_keys: Mapping[str, str]
    matmul_precision: MatmulPrecision


@dataclass(frozen=True, kw_only=True)
class MeasureSpeed:
    """Measure the throughput of a model alternately with that of the dense one.

    Attributes:
        file: File of measurements.
        key: Of model and settings.
    """

    dense: ModelConfig
    model: ModelConfig
    file: str
    key: str
    speed: SpeedConfig


def write_request(request: object, file: Path) -> None:
    """Write the file that a process reads."""
    text = json.dumps(to_plain(request), indent=1) + "\n"
    write_file(file, lambda path: path.write_text(text, encoding="utf-8"))


def task_settings(tasks: TasksConfig) -> TaskSettings:
    """Return what task results depend on besides the model."""
    return TaskSettings(
        limit=tasks.limit,
        num_fewshot=tasks.num_fewshot,
        batch_size=tasks.batch_size,
        seed=tasks.seed,
    )


def _convert(request: Convert) -> None:
    folder = Path(request.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another command may be converting the same model
        if folder.is_dir():
            return
        loaded = load_model(replace(request.model, dtype="auto", device="cpu"))
        with TemporaryDirectory(dir=folder.parent) as unfinished:
            part = Path(unfinished) / folder.name
            save_model(loaded.model, part, tokenizer=loaded.tokenizer)
            if loaded.origin.licence is not None:
                _write_licence(part, loaded)
            part.rename(folder)


def _write_licence(folder: Path, loaded: LoadedModel) -> None:
    """Keep the licence, which the cards of compressed models state."""
    (folder / "README.md").write_text(
        f"---\nlicense: {loaded.origin.licence}\n---\n\n{loaded.origin.name}, as float32\n",
        encoding="utf-8",
    )
    for file in loaded.origin.licence_files:
        (folder / file.name).write_bytes(file.read_bytes())


def check_measurable(
    models: Sequence[ModelConfig], texts: Mapping[str, EvaluationConfig], tasks: TasksConfig
) -> None:
    """Check that every text has the windows that are asked for, and every task its data.

    No weights are read. What no model could be measured on is a ``GraspError``.
    """
    if tasks.names:
        Harness(tasks.names, tasks.task_data, task_settings(tasks))
    for model in models:
        empty, tokenizer = load_without_weights(model)
        for name, text in texts.items():
            _windows(DecoderView(empty), tokenizer, text, name)


def _windows(
    view: DecoderView, tokenizer: PreTrainedTokenizerBase, text: EvaluationConfig, name: str
) -> TokenWindows:
    with renamed("evaluation", f"texts.{name}"):
        check_length(view, text.seqlen, "evaluation.seqlen")
        windows = evaluation_windows(text, tokenizer)
    check_vocabulary(view, windows.input_ids)
    return windows


def _measure(request: Measure) -> None:
    file, tasks, harness = Path(request.file), request.tasks, None
    if request.task_keys:
        harness = Harness(list(request.task_keys), tasks.task_data, task_settings(tasks))
    torch.set_float32_matmul_precision(request.matmul_precision)  # until this process ends
    loaded = load_model(request.model)
    view, done = DecoderView(loaded.model), Measurements.read(file)
    done = replace(done, machine=machine_line())
    if done.cost is None or done.cost.key != request.key:
        cost = measure_cost(view, loaded.origin.source_bytes)
        done = replace(done, cost=Keyed(key=request.key, result=cost))
        done.write(file)
    for name, key in request.text_keys.items():
        text = Keyed(key=key, result=_perplexity(loaded, view, request.texts[name], name))
        done = replace(done, texts={**done.texts, name: text})
        done.write(file)
    for name, key in request.task_keys.items():
        assert harness is not None  # there are tasks
        task = Keyed(key=key, result=harness.run(loaded.model, loaded.tokenizer, name))
        done = replace(done, tasks={**done.tasks, name: task})
        done.write(file)


def _perplexity(
    loaded: LoadedModel, view: DecoderView, text: EvaluationConfig, name: str
) -> CorpusResult:
    start, windows = perf_counter(), _windows(view, loaded.tokenizer, text, name)
    return CorpusResult(
        perplexity=evaluate_perplexity(view, batches(windows, text.batch_size)),
        num_tokens=windows.num_targets,
        num_windows=len(windows),
        windows_sha256=windows.sha256,
        seconds=perf_counter() - start,
    )


def _measure_speed(request: MeasureSpeed) -> None:
    speed, file = request.speed, Path(request.file)
    models = {"dense": load_model(request.dense).model, "model": load_model(request.model).model}
    for model in models.values():
        for key in ("prefill_length", "prompt_length"):
            check_length(DecoderView(model), getattr(speed, key) or 1, f"speed.{key}")
    workload = Workload(
        prefill_lengths=() if speed.prefill_length is None else (speed.prefill_length,),
        decode_batch_sizes=() if speed.decode_batch_size is None else (speed.decode_batch_size,),
        prompt_length=speed.prompt_length,
        new_tokens=speed.new_tokens,
        num_rounds=speed.rounds,
        seed=speed.seed,
        vocabulary=min(map(vocabulary_size, models.values())),
    )
    timings = measure_throughput(models, workload, _untracked)["model"]
    result: dict[str, Speed] = {timing.setting.kind: _speed_of(timing) for timing in timings}
    done = Measurements.read(file)
    replace(done, speed=Keyed(key=request.key, result=result)).write(file)


def _speed_of(timing: Timing) -> Speed:
    assert timing.ratio is not None  # it is not the first model
    return Speed(tokens_per_second=timing.tokens_per_second, ratio=timing.ratio)


def _untracked(turns: Sequence[Turn], description: str) -> Sequence[Turn]:
    del description
    return turns


def machine_line() -> str:
    """Return processor, cores, memory and versions on one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{processor_name()}, {os.cpu_count() or 1} cores, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )


WORK: Final[Mapping[str, tuple[type, Callable[[Any], None]]]] = MappingProxyType(
    {  # Any: the type before it
        "convert": (Convert, _convert),
        "measure": (Measure, _measure),
        "speed": (MeasureSpeed, _measure_speed),
    }
)
"""The request and the function of each kind of work."""


def main(argv: Sequence[str]) -> int:
    """Do one kind of work and return the exit code."""
    end_with_parent()
    kind, work = WORK[argv[0]]
    try:
        content = read_json(Path(argv[1]), OutputError, argv[1], "start compare again")
        work(as_type(kind, content, argv[1], OutputError))
    except GraspError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return _BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
