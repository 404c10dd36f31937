"""Runs tasks of the Language Model Evaluation Harness (lm-eval) on a model in memory."""

import difflib
import hashlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.config.values import Count, CountOrZero, LibrarySeed, check_values
from grasp_lightning.errors import ConfigError, DataError
from grasp_lightning.evaluation.adapters import (
    Predict,
    gathering_class,
    lm_eval_library,
    sharing_class,
)
from grasp_lightning.evaluation.shared_prefixes import can_share
from grasp_lightning.evaluation.task_data import evaluated_split, first_line_without, local_config
from grasp_lightning.evaluation.task_results import TaskRun, task_result

logger = logging.getLogger(__name__)

_RANDOM_SEED = 0  # lm-eval's default seed of Python's generator


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What task results depend on besides the model.

    Attributes:
        limit: Documents per task, from its start; None takes all.
        num_fewshot: Examples before each question; None takes each task's default.
        batch_size: Requests per forward pass.
        seed: Seed of few-shot examples and of sampling.
    """

    limit: Count | None = None
    num_fewshot: CountOrZero | None = None
    batch_size: Count = 1
    seed: LibrarySeed = 1234


@cache
def _task_manager() -> Any:  # noqa: ANN401  lm-eval has no usable types
    """Return this process's index of all tasks; building it takes seconds."""
    with _quiet():
        return lm_eval_library().tasks.TaskManager()


class Harness:
    """Runs tasks of lm-eval on models in memory.

    A task with a folder in ``task_data`` reads its data from there; its prompts, metrics and name
    come from the installed lm-eval. Other tasks use the hub. An unknown name or a number out of
    range is a ``ConfigError``.

    Args:
        names: Tasks, tags or groups to run.
        task_data: Folder with ``<task>/<split>.jsonl``; None takes all data from the hub.
        settings: What results depend on.

    Raises:
        DataError: If ``task_data`` is not a folder.
    """

    def __init__(self, names: Sequence[str], task_data: str | None, settings: TaskSettings) -> None:
        check_values(settings)
        self._library = lm_eval_library()
        self._settings = settings
        self._folder = None if task_data is None else Path(task_data).expanduser().absolute()
        if self._folder is not None and not self._folder.is_dir():
            raise DataError(
                f"task_data: {task_data} is not a folder; expected <task>/<split>.jsonl"
            )
        self._manager = _task_manager()
        # Bad names and local files fail here, before a model runs.
        self._files: dict[str, Path] = {}
        self._specs = {name: self._spec(name) for name in dict.fromkeys(names)}
        for name, spec in self._specs.items():
            if not isinstance(spec, str):
                self._tasks(name)

    @property
    def fingerprint(self) -> dict[str, str]:
        """lm-eval's version and hashes of local files, on which results depend."""
        hashes = {
            f"task_data.{task}": hashlib.sha256(file.read_bytes()).hexdigest()
            for task, file in self._files.items()
        }
        return {"lm_eval": version("lm_eval"), **hashes}

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        predict: Predict | None = None,
    ) -> TaskRun:
        """Run one of ``names`` on a model in eval mode.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            name: The task, tag or group.
            predict: Returns the logits of all batches of token ids of a task, in order; None: the
                model is called for each batch, and may write text.
        """
        start, settings = time.perf_counter(), self._settings
        options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": settings.batch_size}
        with _quiet():
            if predict is not None:
                adapter = gathering_class()(predict, name, **options)
            elif can_share(model):
                adapter = sharing_class()(**options)
            else:
                adapter = self._library.models.huggingface.HFLM(**options)
            results = self._library.simple_evaluate(
                model=adapter,
                tasks=self._tasks(name),
                task_manager=self._manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                random_seed=_RANDOM_SEED,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        found, wanted = {}, settings.num_fewshot
        for task, values in results["results"].items():
            found[task] = result = task_result(task, values, results, model.dtype)
            if wanted is not None and result.num_fewshot not in (None, wanted):
                logger.warning(
                    "%s has a fixed number of examples, %s, which replaces num_fewshot %s",
                    task,
                    result.num_fewshot,
                    wanted,
                )
        return TaskRun(results=found, seconds=time.perf_counter() - start)

    def _spec(self, name: str) -> str | dict[str, Any]:  # Any: a task's configuration
        """Return what lm-eval loads for a name: the name, or a group that overrides its data."""
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
            config, folder = self._manager.task_index[task].cfg, self._folder / task
            num_fewshot = self._settings.num_fewshot
            configs.append(local_config(task, config, folder, num_fewshot=num_fewshot))
            self._files[task] = folder / f"{evaluated_split(config)}.jsonl"
        return {"group": f"local_{name}", "task": configs}

    def _leaves(self, name: str) -> Iterator[str]:
        """Yield the tasks below a name."""
        entry = self._manager.task_index[name]
        if name in self._manager.all_tags:
            yield from self._members(sorted(entry.tags))
        elif name in self._manager.all_groups:
            yield from self._members(entry.cfg["task"])
        else:
            yield name

    def _members(self, members: Sequence[Any]) -> Iterator[str]:  # Any: names or configurations
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
        # ValueError: an uncached data set, offline.
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
        """Render every local document as lm-eval will, so that a bad one fails now."""
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
        """Return an error that names the file and the line without a field."""
        found = re.search(r"'([^']+)'(?: is undefined|$)|attribute '([^']+)'", str(error))
        field = next((group for group in found.groups() if group), "") if found else ""
        for task, file in self._files.items():
            if task == name and field and (line := first_line_without(file, field)):
                return DataError(f"{file}, line {line}: no field {field!r}, which {task} reads")
        return DataError(
            f"{name}: its data lacks something that lm-eval reads ({error}); expected the same "
            "fields as in its data set on the hub"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's logs about its internals; errors and progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
