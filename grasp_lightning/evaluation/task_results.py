"""Task results, read from lm-eval's own."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grasp_lightning.errors import NumericsError
from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.models.integrity import nan_advice

_NO_FILTER = "none"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Results of one task or group.

    Attributes:
        metrics: Mean and standard error by metric, such as ``acc``, ``acc_norm`` or
            ``exact_match,strict-match`` (metric, filter).
        num_samples: Number of documents; 0 for a group.
        num_fewshot: Examples before each question; None for a group.
        version: Version of the task's definition in lm-eval.
        samples: Values per document of each numeric metric, in the order of documents.
        documents: Hash of all documents, prompts and targets; samples of two models can be paired
            if their hashes are equal.
    """

    metrics: Mapping[str, Estimate]
    num_samples: int = 0
    num_fewshot: int | None = None
    version: str = ""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    documents: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """Results of one requested name: one task, or several for a tag or a group."""

    results: Mapping[str, TaskResult]
    seconds: float


def task_result(
    task: str,
    values: Mapping[str, Any],  # Any: results of lm-eval
    results: Mapping[str, Any],
    dtype: torch.dtype,
) -> TaskResult:
    """Return lm-eval's result of one task or group.

    Args:
        results: All results of lm-eval.

    Raises:
        NumericsError: If a metric or a likelihood is NaN.
    """
    advice = nan_advice(dtype).replace("model.dtype", "dtype")  # the key of evaluate
    metrics = {}
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if math.isnan(value):
            raise NumericsError(f"{task}: {metric} is NaN; {advice}")
        stderr = values.get(f"{metric}_stderr,{name}")  # "N/A" where there is none
        is_known = isinstance(stderr, int | float) and math.isfinite(stderr)
        metrics[_metric_name(metric, name)] = Estimate(float(value), stderr if is_known else None)
    records = (results.get("samples") or {}).get(task, [])
    if any(_holds_nan(record["resps"]) for record in records):
        # lm-eval would pick the first answer.
        raise NumericsError(f"{task}: a likelihood is NaN; {advice}")
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
