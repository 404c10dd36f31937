"""Everything that ``evaluate`` measured on one model, convertible to plain values."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grasp_lightning.evaluation.cost import ModelCost
from grasp_lightning.evaluation.paired import Estimate, mean_of, paired_difference
from grasp_lightning.evaluation.task_results import TaskResult, TaskRun
from grasp_lightning.reading.typed import to_plain

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


@dataclass(frozen=True, kw_only=True)
class CorpusResult:
    """Perplexity on one corpus.

    Attributes:
        num_tokens: Number of predicted tokens.
        windows_sha256: Hash of the windows; if equal, two models saw the same tokens.
        seconds: Wall-clock time.
    """

    perplexity: float
    num_tokens: int
    num_windows: int
    windows_sha256: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """All measurements of one model.

    Attributes:
        model: The model as the user named it.
        sha256: Hash of its weights.
        cost: None until measured.
        peak_memory_bytes: Peak memory of the evaluation, without other models.
        corpora: Perplexity by corpus.
        tasks: Runs of tasks by requested name.
    """

    model: str
    sha256: str
    cost: ModelCost | None = None
    peak_memory_bytes: int | None = None
    corpora: Mapping[str, CorpusResult] = field(default_factory=dict)
    tasks: Mapping[str, TaskRun] = field(default_factory=dict)

    @property
    def task_results(self) -> dict[str, TaskResult]:
        """Results of all tasks and groups, by their own names."""
        return {name: result for run in self.tasks.values() for name, result in run.results.items()}

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return plain values.

        ``model``, ``sha256``, ``cost.{parameters,decoder_linear_parameters,bytes,
        decoder_linear_bytes,flops_per_token,disk_bytes,dtype}``, ``peak_memory_bytes``,
        ``corpora.<name>.{perplexity,num_tokens,num_windows,windows_sha256,seconds}``,
        ``tasks.<name>.seconds`` and ``tasks.<name>.results.<task>.{metrics.<metric>.{value,stderr},
        num_samples,num_fewshot,version,samples,documents}``.
        """
        content: dict[str, Any] = to_plain(self)
        return content


def paper_mean(results: Mapping[str, TaskResult]) -> Estimate | None:
    """Return the mean ``acc`` of the paper's seven tasks; None if a task is missing.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Table 1.
    """
    found = (results[task].metrics.get("acc") for task in PAPER_SEVEN if task in results)
    return _mean_of_seven(found)


def task_difference(
    result: TaskResult, reference: TaskResult | None, metric: str
) -> Estimate | None:
    """Return the mean paired difference of a metric from another model's on the same documents.

    None where the documents differ or the metric is not a mean over documents.
    """
    if reference is None or not result.documents or result.documents != reference.documents:
        return None
    if not (_is_mean(result, metric) and _is_mean(reference, metric)):
        return None
    return paired_difference(result.samples[metric], reference.samples[metric])


def _is_mean(result: TaskResult, metric: str) -> bool:
    """Return whether a metric is the mean of its values per document: a perplexity is not."""
    samples, estimate = result.samples.get(metric, ()), result.metrics.get(metric)
    if estimate is None or len(samples) != result.num_samples or not samples:
        return False
    return math.isclose(math.fsum(samples) / len(samples), estimate.value, rel_tol=1e-9)


def paper_mean_difference(
    results: Mapping[str, TaskResult], references: Mapping[str, TaskResult]
) -> Estimate | None:
    """Return the mean paired difference over the paper's seven tasks; None if one is missing."""
    return _mean_of_seven(
        task_difference(results[task], references.get(task), "acc")
        for task in PAPER_SEVEN
        if task in results
    )


def _mean_of_seven(estimates: Iterable[Estimate | None]) -> Estimate | None:
    known = [estimate for estimate in estimates if estimate is not None]
    return mean_of(known) if len(known) == len(PAPER_SEVEN) else None
