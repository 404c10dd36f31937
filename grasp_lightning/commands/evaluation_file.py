"""The output of ``evaluate``: one JSON file that grows with every finished measurement."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grasp_lightning.commands.result_files import check_parent, write_file
from grasp_lightning.errors import OutputError
from grasp_lightning.evaluation.harness import TaskResult
from grasp_lightning.evaluation.machine import Machine
from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.results import (
    ModelEvaluation,
    paper_mean,
    paper_mean_difference,
    task_difference,
)

_FORMAT = "grasp_lightning evaluation 1"

Settings = Mapping[str, Any]  # Any: values of JSON


class EvaluationFile:
    """What was measured so far, kept in a file if the user named one.

    Args:
        path: The file; None keeps nothing.
        settings: What results depend on beside model, corpus and task; a file with others is not
            gone on with.
        machine: What measures now.
        overwrite: Forget what the file holds.

    Raises:
        OutputError: If the file holds something else, or cannot be written.
    """

    def __init__(
        self, path: str | None, settings: Settings, machine: Machine, *, overwrite: bool
    ) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._settings = json.loads(json.dumps(settings))
        self._machine = machine
        self._evaluations: dict[str, ModelEvaluation] = {}
        if self._path is None:
            return
        if self._path.is_dir():
            raise OutputError(f"output: {path} is a folder; expected the path of a JSON file")
        check_parent(self._path)
        if self._path.exists():
            content = self._read()  # also before overwriting: only a file of ours is replaced
            if not overwrite:
                self._check_settings(content["settings"])
                stored = [ModelEvaluation.from_dict(model) for model in content["models"]]
                self._evaluations = {evaluation.model: evaluation for evaluation in stored}

    def _read(self) -> dict[str, Any]:  # Any: values of JSON
        assert self._path is not None
        try:
            content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            is_ours = content["format"] == _FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"output: {self._path} exists and is no output of evaluate; name another file"
            ) from error
        except OSError as error:
            raise OutputError(f"output: cannot read {self._path}: {error.strerror}") from error
        if not is_ours:
            raise OutputError(
                f"output: {self._path} is of another version of evaluate; name another file"
            )
        return content

    def _check_settings(self, stored: Settings) -> None:
        for key, value in self._settings.items():
            if stored.get(key) != value:
                raise OutputError(
                    f"output: {self._path} holds results with {key} {stored.get(key)}, now it is "
                    f"{value}; name another file, or measure again with --overwrite"
                )

    def get(self, model: str, sha256: str) -> ModelEvaluation:
        """Return what was measured of a model.

        Args:
            model: The model, as the user named it.
            sha256: Hash of its weights.

        Returns:
            An evaluation, empty if nothing was measured.

        Raises:
            OutputError: If the file holds results of other weights under this name.
        """
        found = self._evaluations.get(model, ModelEvaluation(model=model, sha256=sha256))
        if found.sha256 != sha256:
            raise OutputError(
                f"output: {self._path} holds results of what {model} was before; name another "
                "file, or measure again with --overwrite"
            )
        return found

    def put(self, evaluation: ModelEvaluation) -> None:
        """Store what was measured of a model, and write the file.

        Args:
            evaluation: All measurements of the model so far.
        """
        self._evaluations[evaluation.model] = evaluation
        if self._path is None:
            return
        evaluations = list(self._evaluations.values())
        content = {
            "format": _FORMAT,
            "settings": self._settings,
            "machine": self._machine.to_dict(),
            "models": [evaluation.to_dict() for evaluation in evaluations],
            "mean_of_seven": {e.model: _plain(paper_mean(e.task_results)) for e in evaluations},
            "differences": {
                "to": evaluations[0].model,
                "models": {e.model: _differences(e, evaluations[0]) for e in evaluations[1:]},
            },
        }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_file(self._path, lambda path: path.write_text(text, encoding="utf-8"))


def _differences(
    evaluation: ModelEvaluation, reference: ModelEvaluation
) -> dict[str, Any]:  # Any: values of JSON
    results, references = evaluation.task_results, reference.task_results
    return {
        **{task: _by_metric(result, references.get(task)) for task, result in results.items()},
        "mean_of_seven": _plain(paper_mean_difference(results, references)),
    }


def _by_metric(result: TaskResult, reference: TaskResult | None) -> dict[str, Any]:  # Any: as above
    return {metric: _plain(task_difference(result, reference, metric)) for metric in result.metrics}


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate._asdict()


def stored_section(evaluation: ModelEvaluation, settings: Settings) -> dict[str, Any]:  # Any: JSON
    """Return the section ``evaluation`` of a run's ``metrics.json``: without values per document.

    Args:
        evaluation: What was measured of the run's model.
        settings: What the results depend on.

    Returns:
        Plain values.
    """
    tasks = {
        task: {
            "metrics": {name: _plain(value) for name, value in result.metrics.items()},
            "num_samples": result.num_samples,
            "num_fewshot": result.num_fewshot,
            "version": result.version,
        }
        for task, result in evaluation.task_results.items()
    }
    return {
        "settings": dict(settings),
        "cost": None if evaluation.cost is None else asdict(evaluation.cost),
        "peak_memory_bytes": evaluation.peak_memory_bytes,
        "corpora": {name: asdict(result) for name, result in evaluation.corpora.items()},
        "tasks": tasks,
        "mean_of_seven": _plain(paper_mean(evaluation.task_results)),
    }
