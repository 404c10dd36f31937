"""Tasks of the Language Model Evaluation Harness (lm-eval), on a model in memory."""

import difflib
import hashlib
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import UndefinedError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.config.values import Count, CountOrZero, LibrarySeed, check_values
from grasp_lightning.errors import ConfigError, DataError, NumericsError
from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.task_data import evaluated_split, first_line_without, local_config

logger = logging.getLogger(__name__)

PAPER_SEVEN = (
    "openbookqa",
    "arc_easy",
    "winogrande",
    "hellaswag",
    "arc_challenge",
    "piqa",
    "mathqa",
)
"""The tasks of Liu et al., "GRASP", arXiv:2501.00339, Table 1, whose mean accuracy it reports."""

_NO_FILTER = "none"
_RANDOM_SEED = 0  # lm-eval's own, of Python's generator


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What results of tasks depend on, beside the model.

    Attributes:
        limit: Documents per task, from its start; None takes all.
        num_fewshot: Examples before each question; None takes each task's own number.
        batch_size: Requests per forward pass.
        seed: Seed of few-shot examples and of sampling.
    """

    limit: Count | None = None
    num_fewshot: CountOrZero | None = None
    batch_size: Count = 1
    seed: LibrarySeed = 1234


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task, or a group of them, measured.

    Attributes:
        metrics: Mean and standard error by metric, such as ``acc``, ``acc_norm`` or
            ``exact_match,strict-match`` (metric, filter).
        num_samples: Number of documents; 0 for a group.
        num_fewshot: Examples before each question; None for a group.
        version: Version of the task's definition in lm-eval.
        samples: Value of each metric that is a number per document, in the order of documents.
        documents: Hash of all documents, prompts and targets: samples of two models can be paired
            if it is equal.
    """

    metrics: Mapping[str, Estimate]
    num_samples: int = 0
    num_fewshot: int | None = None
    version: str = ""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    documents: str = ""

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return plain values."""
        return {
            "metrics": {name: estimate._asdict() for name, estimate in self.metrics.items()},
            "num_samples": self.num_samples,
            "num_fewshot": self.num_fewshot,
            "version": self.version,
            "samples": {name: list(values) for name, values in self.samples.items()},
            "documents": self.documents,
        }


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """What one requested name gave: a task alone, or several for a tag or a group.

    Attributes:
        results: By name of the task or group.
        seconds: Wall-clock time.
    """

    results: Mapping[str, TaskResult]
    seconds: float

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return plain values."""
        results = {name: result.to_dict() for name, result in self.results.items()}
        return {"results": results, "seconds": self.seconds}


class _LmEval(NamedTuple):
    """The parts of lm-eval that are used.

    Attributes:
        simple_evaluate: Runs tasks on a model.
        TaskManager: Knows all tasks.
        HFLM: Wraps a transformers model.
    """

    simple_evaluate: Any  # Any: lm-eval has no usable types
    TaskManager: Any
    HFLM: Any


def _lm_eval() -> _LmEval:
    """Import lm-eval, which is an extra, and slow to import."""
    try:
        from lm_eval import simple_evaluate  # noqa: PLC0415
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-eval, which cannot be imported ({error}); install it with "
            "pip install 'grasp-lightning[eval]'"
        ) from error
    return _LmEval(simple_evaluate, TaskManager, HFLM)


@cache
def _task_manager() -> Any:  # noqa: ANN401  lm-eval has no usable types
    """Return the one index of all tasks of this process; reading it takes seconds."""
    with _quiet():
        return _lm_eval().TaskManager()


class Harness:
    """Runs tasks of lm-eval on models in memory.

    A task whose folder exists below ``task_data`` takes its data from there; its prompts, metrics
    and name stay those of the installed lm-eval. Other tasks take theirs from the hub. A name that
    is unknown, or a number out of range, is a ``ConfigError``.

    Args:
        names: Tasks, tags or groups that will be run.
        task_data: Folder with ``<task>/<split>.jsonl``; None takes all data from the hub.
        settings: What results depend on.

    Raises:
        DataError: If ``task_data`` is no folder.
    """

    def __init__(self, names: Sequence[str], task_data: str | None, settings: TaskSettings) -> None:
        check_values(settings)
        self._library = _lm_eval()
        self._settings = settings
        self._folder = None if task_data is None else Path(task_data).expanduser().absolute()
        if self._folder is not None and not self._folder.is_dir():
            raise DataError(f"task_data: {task_data} is no folder; expected <task>/<split>.jsonl")
        self._manager = _task_manager()
        # What can be wrong with a name or a local file is found before a model runs.
        self._files: dict[str, Path] = {}
        self._specs = {name: self._spec(name) for name in dict.fromkeys(names)}
        for name, spec in self._specs.items():
            if not isinstance(spec, str):
                self._tasks(name)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What results depend on beside the settings: lm-eval's version, hashes of local files."""
        hashes = {
            f"task_data.{task}": hashlib.sha256(file.read_bytes()).hexdigest()
            for task, file in self._files.items()
        }
        return {"lm_eval": version("lm_eval"), **hashes}

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> TaskRun:
        """Run one of the names on a model.

        Args:
            model: The model, in eval mode, on any device.
            tokenizer: Its tokenizer.
            name: One of ``names``.

        Returns:
            What was measured.
        """
        start, settings = time.perf_counter(), self._settings
        with _quiet():
            results = self._library.simple_evaluate(
                model=self._library.HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size
                ),
                tasks=self._tasks(name),
                task_manager=self._manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                random_seed=_RANDOM_SEED,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        found = {
            task: _task_result(task, values, results) for task, values in results["results"].items()
        }
        wanted = settings.num_fewshot
        for task, result in found.items():
            if wanted is not None and result.num_fewshot not in (None, wanted):
                logger.warning(
                    "%s has its own number of examples, %s, instead of num_fewshot %s",
                    task,
                    result.num_fewshot,
                    wanted,
                )
        return TaskRun(results=found, seconds=time.perf_counter() - start)

    def _spec(self, name: str) -> str | dict[str, Any]:  # Any: a task's configuration
        """Return what lm-eval loads for a name: the name, or a group that changes its data."""
        entry = self._manager.task_index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self._manager.all_tasks, n=3, cutoff=0.6)
            hint = f"; the closest names are {', '.join(near)}" if near else ""
            raise ConfigError(f"tasks: lm-eval has no task, tag or group {name!r}{hint}")
        if self._folder is None:
            return name
        members = list(self._leaves(name))
        local = [task for task in members if (self._folder / task).is_dir()]
        if not local:
            return name
        if local != members or name in self._manager.all_groups:
            raise ConfigError(
                f"tasks: task_data has data for {', '.join(local)} of {name}; name the tasks "
                f"instead: {', '.join(members)}"
            )
        configs = []
        for task in members:
            config = self._manager.task_index[task].cfg
            folder = self._folder / task
            configs.append(
                local_config(task, config, folder, num_fewshot=self._settings.num_fewshot)
            )
            self._files[task] = folder / f"{evaluated_split(config)}.jsonl"
        return {"group": f"local_{name}", "task": configs}

    def _leaves(self, name: str) -> Iterator[str]:
        """Yield the tasks below a name."""
        entry = self._manager.task_index[name]
        if name in self._manager.all_tags:
            members: list[Any] = sorted(entry.tags)  # Any: names or inline configurations
        elif name in self._manager.all_groups:
            members = entry.cfg["task"]
        else:
            yield name
            return
        yield from self._members(members)

    def _members(self, members: Sequence[Any]) -> Iterator[str]:  # Any: as above
        for member in members:
            inner = member if isinstance(member, str) else member.get("task", member.get("group"))
            if isinstance(inner, list):  # a group defined inside a group
                yield from self._members(inner)
            elif inner in self._manager.task_index:
                yield from self._leaves(inner)

    def _tasks(self, name: str) -> list[Any]:  # Any: tasks and groups of lm-eval
        import datasets  # noqa: PLC0415  # slow to import, so loaded on use

        spec = self._specs[name]
        try:
            with _quiet():
                loaded = self._manager.load([spec])
                for task in loaded["tasks"].values():
                    self._check_documents(task)
        except (KeyError, UndefinedError) as error:
            raise self._missing_field(name, error) from error
        except ImportError as error:
            raise ConfigError(f"tasks: {name} needs more packages: {error}") from error
        # ValueError: what datasets raises offline for a data set that is not in its cache.
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{name}: its data cannot be loaded: {reason}; without internet, put it in "
                f"<task_data>/{name}/<split>.jsonl"
            ) from error
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"tasks: {name} runs code that the model wrote; use lm_eval itself"
                )
        if isinstance(spec, str) and spec in loaded["groups"]:
            return [loaded["groups"][spec]]
        return list(loaded["tasks"].values())

    def _check_documents(self, task: Any) -> None:  # noqa: ANN401  lm-eval has no usable types
        """Render every local document, as lm-eval will, so that a bad one is named now."""
        file = self._files.get(task.config.task)
        if file is None or not hasattr(task, "doc_to_choice"):
            return
        for index, document in enumerate(task.eval_docs):
            if index == self._settings.limit:
                return
            try:
                task.doc_to_text(document)
                task.doc_to_target(document)
                if task.config.doc_to_choice is not None:
                    task.doc_to_choice(document)
            except (ValueError, IndexError, TypeError) as error:
                raise DataError(
                    f"{file}, document {index + 1}: {task.config.task} cannot use it ({error})"
                ) from error

    def _missing_field(self, name: str, error: Exception) -> DataError:
        """Return an error that names the file and the line where a field is missing."""
        found = re.search(r"'([^']+)'(?: is undefined|$)|attribute '([^']+)'", str(error))
        field = next((group for group in found.groups() if group), "") if found else ""
        for task, file in self._files.items():
            if task == name and field and (line := first_line_without(file, field)):
                return DataError(f"{file}, line {line}: no field {field!r}, which {task} reads")
        return DataError(
            f"{name}: its data lacks something that lm-eval reads ({error}); expected the fields "
            "of the data set that it takes from the hub"
        )


def _task_result(
    task: str, values: Mapping[str, Any], results: Mapping[str, Any]
) -> TaskResult:  # Any: results of lm-eval
    metrics = {}
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if math.isnan(value):
            raise NumericsError(
                f"{task}: {metric} is NaN; check the checkpoint, or try dtype float32"
            )
        stderr = values.get(f"{metric}_stderr,{name}")  # "N/A" where there is none
        is_known = isinstance(stderr, int | float) and math.isfinite(stderr)
        metrics[_metric_name(metric, name)] = Estimate(float(value), stderr if is_known else None)
    records = (results.get("samples") or {}).get(task, [])
    if any(_holds_nan(record["resps"]) for record in records):
        # lm-eval would take the first answer for the likeliest one.
        raise NumericsError(
            f"{task}: a likelihood is NaN; check the checkpoint, or try dtype float32"
        )
    count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
    return TaskResult(
        metrics=metrics,
        num_samples=int(count),
        num_fewshot=results.get("n-shot", {}).get(task),
        version=str(results.get("versions", {}).get(task, "")),
        samples=_samples(records),
        documents=_documents_hash(records),
    )


def _holds_nan(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_nan(part) for part in value)
    return isinstance(value, float) and math.isnan(value)


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == _NO_FILTER else f"{metric},{filter_name}"


def _samples(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:  # Any: as above
    samples: dict[str, list[float]] = {}
    for record in records:
        for metric in record["metrics"]:
            value = record[metric]
            if isinstance(value, int | float):
                name = _metric_name(metric, record["filter"])
                samples.setdefault(name, []).append(float(value))
    return samples


def _documents_hash(records: Sequence[Mapping[str, Any]]) -> str:  # Any: as above
    digest = hashlib.sha256()
    for record in records:
        for part in ("doc_hash", "prompt_hash", "target_hash"):
            digest.update(record[part].encode())
    return digest.hexdigest() if records else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what lm-eval tells about its own workings; errors and progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
