"""The report of one run: a single HTML page that needs no other file and no network."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from grasp_lightning.plan import Plan
from grasp_lightning.reporting import evaluation, throughput
from grasp_lightning.reporting.details import Details, decision_details
from grasp_lightning.reporting.drawing import Plot
from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics
from grasp_lightning.reporting.plots import run_plots, training_plot
from grasp_lightning.reporting.tables import (
    NOT_MEASURED,
    AnyMetrics,
    comparison_notes,
    comparison_rows,
    count_text,
    difference_text,
    done_to_layers,
    duration_text,
    epochs_text,
    factor_text,
    indices_text,
    loss_text,
    perplexity_text,
    size_text,
    summary,
)

_ARROW = "\u2192"
_PHASES = {
    "load": "Load the model",
    "sample": "Let the model write text",
    "similarity": "Measure the decoder layers",
    "attribution": "Score singular components",
    "curvature": "Measure the curvature of the loss",
    "factorize": "Factorise and replace",
    "cut_losses": "Measure each cut by itself",
    "refit": "Fit what was cut once more",
    "save": "Save the model",
    "verify": "Load it in a fresh process",
    "evaluate": "Evaluate before and after",
}
_TRAINING_PHASES = {
    "load": "Load model and data",
    "train": "Train",
    "evaluate": "Evaluate before and after",
    "save": "Save the model",
    "verify": "Load it in a fresh process",
}


class Headline(NamedTuple):
    """A large number at the top of the page, with its unit; the detail may be empty."""

    label: str
    value: str
    detail: str


def render_report(
    metrics: Metrics,
    plan: Plan,
    scores: Mapping[str, Tensor],
    config: Mapping[str, Any],  # Any: values of YAML
) -> str:
    """Return the page of a compression; equal inputs give equal text."""
    return _render(
        metrics,
        config,
        run_plots(metrics, plan, scores),
        _headlines(metrics),
        _PHASES,
        details=decision_details(metrics, plan, scores),
    )


def render_compensation_report(
    metrics: CompensationMetrics,
    config: Mapping[str, Any],  # Any: values of YAML
) -> str:
    """Return the page of a compensation; equal inputs give equal text."""
    history = metrics.history
    plots = [training_plot(history, kept_step=metrics.best_step)] if history.steps else []
    return _render(metrics, config, plots, _training_headlines(metrics), _TRAINING_PHASES)


def _render(
    metrics: AnyMetrics,
    config: Mapping[str, Any],  # Any: values of YAML
    plots: Iterable[Plot],
    headlines: Iterable[Headline],
    phases: Mapping[str, str],
    *,
    details: Iterable[Details] = (),
) -> str:
    environment = Environment(
        loader=PackageLoader("grasp_lightning", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        kind="compensation" if isinstance(metrics, CompensationMetrics) else "compression",
        metrics=metrics,
        summary=summary(metrics),
        headlines=[*headlines, *_total(metrics)],
        rows=comparison_rows(metrics),
        notes=comparison_notes(metrics),
        plots=[(plot, _data_uri(plot)) for plot in plots],
        details=details,
        phases=_phases(metrics, phases),
        evaluation=evaluation.section_rows(metrics.evaluation) if metrics.evaluation else [],
        throughput=throughput.section_rows(metrics.throughput) if metrics.throughput else [],
        throughput_reference=metrics.throughput["models"][0]["name"] if metrics.throughput else "",
        settings=yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=False),
    )


def _headlines(metrics: Metrics) -> list[Headline]:
    parameters = metrics.parameters
    return [
        Headline(
            "Parameters removed",
            f"{metrics.removed_ratio:.1%}",
            f"{count_text(parameters.dense)} {_ARROW} {count_text(parameters.compressed)}",
        ),
        Headline(
            f"Size at {metrics.dtype}",
            size_text(metrics.bytes.compressed),
            f"from {size_text(metrics.bytes.dense)}",
        ),
        _perplexity(metrics),
        Headline(
            f"Layers {done_to_layers(metrics)}",
            str(len(metrics.changed_layers)),
            indices_text(metrics.changed_layers),
        ),
    ]


def _training_headlines(metrics: CompensationMetrics) -> list[Headline]:
    parameters, losses = metrics.parameters, metrics.validation_loss.values
    share = parameters.trainable / parameters.after if parameters.after else 0.0
    return [
        _perplexity(metrics),
        Headline(
            "Validation loss",
            difference_text(*losses) or NOT_MEASURED,
            f" {_ARROW} ".join(map(loss_text, losses)),
        ),
        Headline(
            "Trainable parameters",
            count_text(parameters.trainable),
            f"{share:.1%} of the model's size",
        ),
        Headline(
            "Optimizer steps",
            f"{metrics.steps:,}",
            f"{epochs_text(metrics.epochs)}, {count_text(metrics.trained_tokens)} tokens",
        ),
    ]


def _perplexity(metrics: AnyMetrics) -> Headline:
    perplexities = metrics.perplexity.values
    return Headline(
        "Perplexity",
        factor_text(*perplexities) or NOT_MEASURED,
        f" {_ARROW} ".join(map(perplexity_text, perplexities)),
    )


def _total(metrics: AnyMetrics) -> list[Headline]:
    """Return the duration of the command, or nothing if it was not measured."""
    if metrics.seconds.total is None:
        return []
    memory = metrics.peak_memory_bytes
    detail = "" if memory is None else f"{size_text(memory)} at its peak"
    return [Headline("Time", duration_text(metrics.seconds.total), detail)]


def _phases(metrics: AnyMetrics, names: Mapping[str, str]) -> list[tuple[str, str, float | None]]:
    """Return name, duration and percentage of the longest, for each phase of the run."""
    times = {
        name: seconds
        for phase, name in names.items()
        if (seconds := getattr(metrics.seconds, phase)) is not None
    }
    if not times:
        return []
    longest = max(times.values()) or 1.0
    return [
        *((n, duration_text(time), round(100 * time / longest, 1)) for n, time in times.items()),
        ("Whole command", duration_text(metrics.seconds.total), None),
    ]


def _data_uri(plot: Plot) -> str:
    # An image of its own keeps the identifiers of one SVG apart from those of the next.
    return "data:image/svg+xml;base64," + base64.b64encode(plot.svg.encode()).decode()
