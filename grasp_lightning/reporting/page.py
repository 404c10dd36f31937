"""The report of one run: a single HTML page that needs no other file and no network."""

import base64
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from torch import Tensor

from grasp_lightning.plan import Plan
from grasp_lightning.reporting import evaluation, tables, throughput
from grasp_lightning.reporting.card_phrases import Values
from grasp_lightning.reporting.details import Details, decision_details
from grasp_lightning.reporting.drawing import Plot
from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics
from grasp_lightning.reporting.plots import layer_errors_plot, run_plots, training_plot
from grasp_lightning.reporting.tables import NOT_MEASURED, AnyMetrics

_ARROW = " \u2192 "
_PHASES = {
    "load": "Load the model",
    "sample": "Generate calibration text",
    "similarity": "Measure decoder layers",
    "attribution": "Score singular components",
    "gradients": "Score layers, heads or channels by gradients",
    "spread": "Measure inputs of heads and channels",
    "curvature": "Measure the curvature of the loss",
    "merges": "Try merges of layers",
    "removals": "Measure removals of layers or blocks",
    "seam": "Compare hidden states around deleted layers",
    "slice": "Find directions of the hidden states",
    "factorize": "Factorise and replace",
    "cut_losses": "Measure each cut alone",
    "refit": "Refit the cut linears",
    "save": "Save the model",
    "verify": "Verify the saved model",
    "evaluate": "Evaluate before and after",
}
_TRAINING_PHASES = {
    "load": "Load model and data",
    "sample": "Generate training text",
    "teacher": "Cache the teacher's predictions",
    "train": "Train",
    "evaluate": "Evaluate before and after",
    "save": "Save the model",
    "verify": "Verify the saved model",
}


class Headline(NamedTuple):
    """A large number at the top of the page, with its unit; the detail may be empty."""

    label: str
    value: str
    detail: str


def render_report(
    metrics: Metrics, plan: Plan, scores: Mapping[str, Tensor], config: Values
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


def render_compensation_report(metrics: CompensationMetrics, config: Values) -> str:
    """Return the page of a compensation; equal inputs give equal text."""
    history, errors = metrics.history, metrics.layer_errors
    plots = [layer_errors_plot(errors)] if errors else []
    if history.steps and metrics.objective != "local":  # each layer begins at its own loss
        plots.append(training_plot(history, kept_step=metrics.best_step))
    return _render(metrics, config, plots, _training_headlines(metrics), _TRAINING_PHASES)


@cache
def page_template(name: str) -> Template:
    """Return a template of this package that escapes every value."""
    environment = Environment(
        loader=PackageLoader("grasp_lightning", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def data_uri(plot: Plot) -> str:
    """Return a plot as the address of an image."""
    # A separate image keeps the identifiers of one SVG apart from those of the others.
    return "data:image/svg+xml;base64," + base64.b64encode(plot.svg.encode()).decode()


def _render(
    metrics: AnyMetrics,
    config: Values,
    plots: Iterable[Plot],
    headlines: Iterable[Headline],
    phases: Mapping[str, str],
    *,
    details: Iterable[Details] = (),
) -> str:
    states = tables.state_names(metrics)
    return page_template("report.html.jinja").render(
        kind="compensation" if isinstance(metrics, CompensationMetrics) else "compression",
        metrics=metrics,
        summary=tables.summary(metrics),
        headlines=[*headlines, *_total(metrics)],
        columns=[("Quantity", "row"), *((s.capitalize(), "number") for s in states)],
        rows=[*tables.comparison_rows(metrics), *tables.cost_rows(metrics)],
        notes=tables.comparison_notes(metrics),
        plots=[(plot, data_uri(plot)) for plot in plots],
        details=details,
        phases=_phases(metrics, phases),
        evaluation=evaluation.section_rows(metrics.evaluation) if metrics.evaluation else [],
        throughput=throughput.section_rows(metrics.throughput) if metrics.throughput else [],
        throughput_reference=metrics.throughput["models"][0]["name"] if metrics.throughput else "",
        settings=yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=False),
    )


def _headlines(metrics: Metrics) -> list[Headline]:
    removed, layers = f"{metrics.removed_ratio:.1%}", metrics.changed_layers
    parameters = _ARROW.join(map(tables.count_text, metrics.parameters.values))
    before, after = map(tables.size_text, metrics.bytes.values)
    done, indices = tables.done_to_layers(metrics), tables.indices_text(layers)
    zeros = [Headline("Weights set to zero", f"{metrics.zero_ratio:.1%}", "of all parameters")]
    return [
        *(zeros if metrics.zero_ratio else ()),
        Headline("Parameters removed", removed, parameters),
        Headline(f"Size at {metrics.dtype}", after, f"from {before}"),
        _perplexity(metrics),
        Headline(f"Layers {done}", str(len(layers)), indices),
    ]


def _training_headlines(metrics: CompensationMetrics) -> list[Headline]:
    parameters, losses = metrics.parameters, metrics.validation_loss.values
    share = parameters.trainable / parameters.after if parameters.after else 0.0
    trainable = tables.count_text(parameters.trainable)
    change = tables.difference_text(*losses) or NOT_MEASURED
    epochs, tokens = tables.epochs_text(metrics.epochs), tables.count_text(metrics.trained_tokens)
    return [
        _perplexity(metrics),
        Headline("Validation loss", change, _ARROW.join(map(tables.loss_text, losses))),
        Headline("Trainable parameters", trainable, f"{share:.1%} of the model's size"),
        Headline("Optimizer steps", f"{metrics.steps:,}", f"{epochs}, {tokens} tokens"),
    ]


def _perplexity(metrics: AnyMetrics) -> Headline:
    values = metrics.perplexity.values
    factor = tables.factor_text(*values) or NOT_MEASURED
    return Headline("Perplexity", factor, _ARROW.join(map(tables.perplexity_text, values)))


def _total(metrics: AnyMetrics) -> list[Headline]:
    if metrics.seconds.total is None:
        return []
    memory = metrics.peak_memory_bytes
    detail = "" if memory is None else f"peak memory {tables.size_text(memory)}"
    return [Headline("Time", tables.duration_text(metrics.seconds.total), detail)]


def _phases(metrics: AnyMetrics, names: Mapping[str, str]) -> list[tuple[str, str, float | None]]:
    """Return name, duration and percentage of the longest, for each phase of the run."""
    found = [(name, getattr(metrics.seconds, phase)) for phase, name in names.items()]
    times = [(name, time) for name, time in found if time is not None]
    if not times:
        return []
    longest = max(time for _, time in times) or 1.0
    rows = [(n, tables.duration_text(t), round(100 * t / longest, 1)) for n, t in times]
    return [*rows, ("Whole command", tables.duration_text(metrics.seconds.total), None)]
