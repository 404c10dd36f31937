"""Results of ``evaluate`` as text: models side by side, with paired differences to the first."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from string import ascii_uppercase
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.results import (
    ModelEvaluation,
    paper_mean,
    paper_mean_difference,
    task_difference,
)
from grasp_lightning.reporting.tables import (
    NOT_MEASURED,
    factor_text,
    narrow_table,
    perplexity_text,
    size_text,
)

_MEGA = 1_000_000
_PERCENT = 100
_MEAN_NAME = "mean of the seven, acc"
_SHOWN_FIRST = ("acc", "acc_norm", "exact_match")
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1")


class EvaluationRow(NamedTuple):
    """One quantity, with its unit, and one text per model."""

    quantity: str
    values: tuple[str, ...]


def evaluation_table(evaluations: Sequence[ModelEvaluation]) -> Table:
    """Return a column per model for the terminal, headed by letters that the caption explains."""
    models = [evaluation.model for evaluation in evaluations]
    letters = ascii_uppercase[: len(models)] if len(models) <= len(ascii_uppercase) else models
    legend = [f"{letter}: {model}" for letter, model in zip(letters, models, strict=True)]
    table = narrow_table([*legend, *evaluation_notes(evaluations)])
    table.add_column("", no_wrap=True)
    for letter in letters:
        table.add_column(Text(letter), justify="right")
    for row in evaluation_rows(evaluations):
        table.add_row(Text(row.quantity), *row.values)
    return table


def evaluation_rows(evaluations: Sequence[ModelEvaluation]) -> list[EvaluationRow]:
    """Return cost, perplexity and tasks as text; differences are to the first model."""
    return [*_cost_rows(evaluations), *_corpus_rows(evaluations), *_task_rows(evaluations)]


def evaluation_notes(evaluations: Sequence[ModelEvaluation]) -> list[str]:
    """Return sentences on how to read the table."""
    notes = []
    if any(evaluation.tasks for evaluation in evaluations):
        notes.append("Accuracies in percent, with standard errors.")
    if len(evaluations) > 1 and any(evaluation.tasks for evaluation in evaluations[1:]):
        notes.append(
            "In brackets: paired difference to the first model on the same documents, and its "
            "standard error."
        )
    return notes


def section_rows(section: Mapping[str, Any]) -> list[tuple[str, str]]:  # Any: values of JSON
    """Return the section ``evaluation`` of a run's metrics as texts of quantity and value."""
    rows = _cost_section(section)
    rows += [
        (
            f"perplexity, {_short(corpus)}, {result['num_tokens']:,} predicted tokens",
            perplexity_text(result["perplexity"]),
        )
        for corpus, result in section["corpora"].items()
    ]
    for task, result in section["tasks"].items():
        for metric in ordered_metrics([result["metrics"]]):
            estimate = Estimate(**result["metrics"][metric])
            count = f", {result['num_samples']:,} documents" if result["num_samples"] else ""
            rows.append((f"{task}, {metric}{count}", _estimate_text(estimate, None, metric)))
    if section["mean_of_seven"] is not None:
        mean = Estimate(**section["mean_of_seven"])
        rows.append((_MEAN_NAME, _estimate_text(mean, None, "acc")))
    return rows


def ordered_metrics(mappings: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the metrics of a task, the usual ones first."""
    order = {metric: place for place, metric in enumerate(_SHOWN_FIRST)}
    return sorted(_names(mappings), key=lambda name: (order.get(_base(name), len(order)), name))


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of documents, such as accuracy."""
    return _base(metric) in _SHARES


def number_text(estimate: Estimate, metric: str, sign: str) -> str:
    """Return a share in percent, and any other number unchanged."""
    scale, form, error_form = (_PERCENT, ".1f", ".1f") if is_share(metric) else (1, ".4g", ".2g")
    value = f"{scale * estimate.value:{sign}{form}}"
    if estimate.stderr is None:
        return value
    return f"{value} \u00b1 {scale * estimate.stderr:{error_form}}"


def _cost_section(section: Mapping[str, Any]) -> list[tuple[str, str]]:  # Any: as above
    rows, cost, peak = [], section["cost"], section["peak_memory_bytes"]
    if cost is not None:
        rows.append(("MFLOPs per token", f"{cost['flops_per_token'] / _MEGA:,.1f}"))
        if cost["disk_bytes"] is not None:
            rows.append(("weight files on disk", size_text(cost["disk_bytes"])))
    if peak is not None:
        rows.append(("peak memory of the evaluation", size_text(peak)))
    return rows


def _cost_rows(evaluations: Sequence[ModelEvaluation]) -> Iterator[EvaluationRow]:
    costs = [evaluation.cost for evaluation in evaluations]
    dtypes = sorted({cost.dtype for cost in costs if cost is not None})

    def row(quantity: str, key: str, text: Callable[[int], str]) -> EvaluationRow:
        values = [None if cost is None else getattr(cost, key) for cost in costs]
        return EvaluationRow(quantity, _texts(values, text))

    if not dtypes:
        return
    yield row("parameters", "parameters", "{:,}".format)
    yield row("parameters in decoder linears", "decoder_linear_parameters", "{:,}".format)
    yield row(f"size at {' / '.join(dtypes)}", "bytes", size_text)
    yield row("size of decoder linears", "decoder_linear_bytes", size_text)
    yield row("weight files on disk", "disk_bytes", size_text)
    yield row("MFLOPs per token", "flops_per_token", lambda count: f"{count / _MEGA:,.1f}")
    peaks = [evaluation.peak_memory_bytes for evaluation in evaluations]
    if any(peak is not None for peak in peaks):
        yield EvaluationRow("peak memory of the evaluation", _texts(peaks, size_text))


def _texts(values: Iterable[int | None], text: Callable[[int], str]) -> tuple[str, ...]:
    return tuple(NOT_MEASURED if value is None else text(value) for value in values)


def _corpus_rows(evaluations: Sequence[ModelEvaluation]) -> Iterator[EvaluationRow]:
    for corpus in _names(evaluation.corpora for evaluation in evaluations):
        results = [evaluation.corpora.get(corpus) for evaluation in evaluations]
        first, values = results[0], []
        for position, result in enumerate(results):
            text = perplexity_text(None if result is None else result.perplexity)
            if position and first and result and first.windows_sha256 == result.windows_sha256:
                text += f" ({factor_text(first.perplexity, result.perplexity)})"
            values.append(text)
        yield EvaluationRow(f"perplexity, {_short(corpus)}", tuple(values))


def _task_rows(evaluations: Sequence[ModelEvaluation]) -> Iterator[EvaluationRow]:
    results = [evaluation.task_results for evaluation in evaluations]
    for task in _names(results):
        for metric in ordered_metrics([found[task].metrics for found in results if task in found]):
            values = []
            for position, found in enumerate(results):
                if task in found:
                    reference = results[0].get(task) if position else None
                    difference = task_difference(found[task], reference, metric)
                    estimate = found[task].metrics.get(metric)
                    values.append(_estimate_text(estimate, difference, metric))
                else:
                    values.append(NOT_MEASURED)
            yield EvaluationRow(f"{task}, {metric}", tuple(values))
    means = [paper_mean(found) for found in results]
    if any(mean is not None for mean in means):
        yield EvaluationRow(
            _MEAN_NAME,
            tuple(
                _estimate_text(
                    mean, paper_mean_difference(found, results[0]) if position else None, "acc"
                )
                for position, (mean, found) in enumerate(zip(means, results, strict=True))
            ),
        )


def _short(corpus: str) -> str:
    return "/".join(PurePath(corpus).parts[-2:])


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _base(metric: str) -> str:
    """Return a metric's name without its filter."""
    return metric.partition(",")[0]


def _estimate_text(estimate: Estimate | None, difference: Estimate | None, metric: str) -> str:
    if estimate is None:
        return NOT_MEASURED
    text = number_text(estimate, metric, "")
    return text if difference is None else f"{text} ({number_text(difference, metric, '+')})"
