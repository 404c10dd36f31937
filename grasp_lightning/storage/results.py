"""Output files of ``evaluate``, written after every measurement, and of ``benchmark``."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grasp_lightning.errors import ConfigError, OutputError
from grasp_lightning.evaluation.machine import Machine
from grasp_lightning.evaluation.results import (
    ModelEvaluation,
    paper_mean,
    paper_mean_difference,
    task_difference,
)
from grasp_lightning.evaluation.task_results import TaskResult
from grasp_lightning.reading.text import read_json
from grasp_lightning.reading.typed import as_type, to_plain
from grasp_lightning.run_folder import write_file

_ANOTHER = "name another file"
_FORMAT = "grasp_lightning evaluation 1"
_BENCHMARK_KEYS = {"workload", "machine", "models"}

Settings = Mapping[str, Mapping[str, Any]]  # Any: values of JSON
"""What results depend on, by part: ``model`` for all, ``windows`` for corpora, ``tasks``."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one command asks for.

    Attributes:
        models: Models in order; the first one is the reference of all differences.
        settings: What results depend on besides these.
        overwrite: Whether to measure again what is stored.
    """

    models: tuple[str, ...]
    corpora: tuple[str, ...]
    tasks: tuple[str, ...]
    settings: Settings
    overwrite: bool


class EvaluationFile:
    """Measurements so far, kept in a file if the user named one.

    Args:
        path: The file; None keeps nothing.
        request: What is asked for. Stored results with other settings are not mixed with new ones.
        machine: The machine that measures now.

    Raises:
        OutputError: If the file contains something else, or cannot be written.
    """

    def __init__(self, path: str | None, request: Request, machine: Machine) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._request = request
        self._settings: dict[str, Any] = json.loads(json.dumps(request.settings))  # Any: JSON
        self._machine = machine
        self._evaluations: dict[str, ModelEvaluation] = {}
        if self._path is None:
            return
        if self._path.is_dir():
            raise OutputError(f"output: {path} is a folder; expected the path of a JSON file")
        check_parent(self._path)
        if self._path.exists():
            stored = self._read()  # also before overwriting: only an output of evaluate is replaced
            for evaluation in stored.models:
                kept = self._kept(evaluation, stored.settings)
                self._evaluations[evaluation.model] = kept

    def _kept(self, evaluation: ModelEvaluation, stored: Settings) -> ModelEvaluation:
        """Return the part of a stored evaluation that stays valid next to new results."""
        request = self._request
        for part, results in (
            ("model", [evaluation.cost, *evaluation.corpora, *evaluation.tasks]),
            ("windows", evaluation.corpora),
            ("tasks", evaluation.tasks if request.tasks else ()),
        ):
            difference = changed_setting(stored.get(part, {}), self._settings[part])
            if difference is None or not results:
                continue
            if not request.overwrite:
                raise OutputError(
                    f"output: {self._path} contains results with {difference}; name another file, "
                    "or measure again with --overwrite"
                )
            evaluation = _without(evaluation, part)
        if not request.overwrite or evaluation.model not in request.models:
            return evaluation
        return replace(
            evaluation,
            cost=None,
            corpora={k: v for k, v in evaluation.corpora.items() if k not in request.corpora},
            tasks={k: v for k, v in evaluation.tasks.items() if k not in request.tasks},
        )

    def _read(self) -> "_Stored":
        assert self._path is not None
        what = f"output: {self._path} exists and is not an output of evaluate"
        content = read_json(self._path, OutputError, f"{what}: it", _ANOTHER)
        if not isinstance(content, dict) or "format" not in content:
            raise OutputError(f"{what}; {_ANOTHER}")
        if content["format"] != _FORMAT:
            raise OutputError(
                f"output: {self._path} was written by another version of evaluate; {_ANOTHER}"
            )
        read = {key: content.get(key) for key in ("settings", "models")}
        return as_type(_Stored, read, what, OutputError, _ANOTHER)

    def get(self, model: str, sha256: str) -> ModelEvaluation:
        """Return the stored measurements of a model, empty if there are none.

        Raises:
            OutputError: If they were made with other weights under this name.
        """
        found = self._evaluations.get(model, ModelEvaluation(model=model, sha256=sha256))
        if found.sha256 != sha256:
            if self._request.overwrite:
                return ModelEvaluation(model=model, sha256=sha256)
            raise OutputError(
                f"output: {self._path} contains results of an earlier version of {model}; name "
                "another file, or measure again with --overwrite"
            )
        return found

    def put(self, evaluation: ModelEvaluation) -> None:
        """Store all measurements of a model so far, and write the file."""
        self._evaluations[evaluation.model] = evaluation
        if self._path is None:
            return
        # In the order of the command, so that differences are to the same model as on the screen.
        order = [name for name in self._request.models if name in self._evaluations]
        order += [name for name in self._evaluations if name not in order]
        evaluations = [self._evaluations[name] for name in order]
        content = {
            "format": _FORMAT,
            "settings": self._settings,
            "machine": self._machine.to_dict(),
            "models": [evaluation.to_dict() for evaluation in evaluations],
            "mean_of_seven": {e.model: to_plain(paper_mean(e.task_results)) for e in evaluations},
            "differences": {
                "to": evaluations[0].model,
                "models": {e.model: _differences(e, evaluations[0]) for e in evaluations[1:]},
            },
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_file(self._path, lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The part of an earlier file that a later start reads."""

    settings: Mapping[str, Mapping[str, Any]]  # Any: values of JSON
    models: tuple[ModelEvaluation, ...]


def _differences(
    evaluation: ModelEvaluation, reference: ModelEvaluation
) -> dict[str, Any]:  # Any: values of JSON
    results, references = evaluation.task_results, reference.task_results
    return {
        **{task: _by_metric(result, references.get(task)) for task, result in results.items()},
        "mean_of_seven": to_plain(paper_mean_difference(results, references)),
    }


def _by_metric(result: TaskResult, reference: TaskResult | None) -> Any:  # noqa: ANN401  as above
    return {
        metric: to_plain(task_difference(result, reference, metric)) for metric in result.metrics
    }


def changed_setting(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:  # Any: JSON
    """Return the first difference between stored and current settings as text; None if equal.

    Only keys on both sides count: a key on one side may belong to a task that the other did not
    run.
    """
    for key in sorted(stored.keys() & now.keys()):
        if stored[key] != now[key]:
            return f"{key} {stored[key]}, now it is {now[key]}"
    return None


def _without(evaluation: ModelEvaluation, part: str) -> ModelEvaluation:
    if part == "windows":
        return replace(evaluation, corpora={})
    if part == "tasks":
        return replace(evaluation, tasks={})
    return ModelEvaluation(model=evaluation.model, sha256=evaluation.sha256)


def stored_section(evaluation: ModelEvaluation, settings: Settings) -> dict[str, Any]:  # Any: JSON
    """Return the section ``evaluation`` of ``metrics.json``, without values per document."""
    content = to_plain(evaluation)
    results: dict[str, dict[str, Any]] = to_plain(evaluation.task_results)  # Any: JSON
    for result in results.values():
        del result["samples"], result["documents"]
    return {
        "settings": {part: dict(values) for part, values in settings.items()},
        **{key: content[key] for key in ("sha256", "cost", "peak_memory_bytes", "corpora")},
        "tasks": results,
        "mean_of_seven": to_plain(paper_mean(evaluation.task_results)),
    }


def merge_sections(
    earlier: Mapping[str, Any], content: Mapping[str, Any]
) -> dict[str, Any]:  # Any: values of JSON
    """Return a new section, with the results of an earlier one that are still valid.

    Those are corpora and tasks that were measured on the same weights with the same settings.
    """
    before, now = earlier["settings"], content["settings"]
    if earlier["sha256"] != content["sha256"] or changed_setting(before["model"], now["model"]):
        return dict(content)
    merged = dict(content)
    for key, part in (("corpora", "windows"), ("tasks", "tasks")):
        if not content[key]:
            merged[key] = earlier[key]
            merged["settings"] = {**merged["settings"], part: before[part]}
        elif changed_setting(before[part], now[part]) is None:
            merged[key] = {**earlier[key], **content[key]}
            merged["settings"] = {**merged["settings"], part: {**before[part], **now[part]}}
    if content["mean_of_seven"] is None and merged["tasks"] == earlier["tasks"]:
        merged["mean_of_seven"] = earlier["mean_of_seven"]
    return merged


class ResultFiles:
    """Output files of a benchmark, checked before it starts.

    Only an earlier benchmark's files are overwritten: a mistyped ``output`` must not cost a model
    its config.json.

    Attributes:
        output: The JSON file.
        plot: The plot of the same name.
    """

    def __init__(self, output: str, overwrite: bool) -> None:
        self.output = Path(output).expanduser()
        if self.output.suffix != ".json":
            raise ConfigError(f"output: expected a file name that ends in .json, got {output!r}")
        self.plot = self.output.with_suffix(".png")
        for file in (self.output, self.plot):
            if file.is_dir():
                raise OutputError(f"output: {file} is a folder, expected a file to write")
            if file.exists() and not overwrite:
                raise OutputError(f"output: {file} exists; name another output or use --overwrite")
        if self.output.exists() or self.plot.exists():
            _check_is_result(self.output)
        check_parent(self.output)


def _check_is_result(file: Path) -> None:
    what = f"output: {file} exists and is not a result of benchmark"
    content = read_json(file, OutputError, f"{what}: it", _ANOTHER)
    if not isinstance(content, dict) or content.keys() != _BENCHMARK_KEYS:
        raise OutputError(f"{what}; name another output")


def check_parent(file: Path, key: str = "output") -> None:
    """Refuse a file, named by a key, whose folder can be neither written nor made."""
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise OutputError(f"{key}: {folder} is a file, expected a folder to write in")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{key}: cannot write in {folder}: permission denied")
