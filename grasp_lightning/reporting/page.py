"""The report of one run: a single HTML page that needs no other file and no network."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from grasp_lightning.plan import FactorizeLinear, Plan
from grasp_lightning.reporting import evaluation, throughput
from grasp_lightning.reporting.compensation_metrics import CompensationMetrics
from grasp_lightning.reporting.linears import (
    module_place,
    predicted_losses,
    removed_parts,
    scored_linears,
)
from grasp_lightning.reporting.metrics import Metrics
from grasp_lightning.reporting.plots import Plot, run_plots
from grasp_lightning.reporting.tables import (
    NOT_MEASURED,
    comparison_notes,
    comparison_rows,
    count_text,
    done_to_layers,
    duration_text,
    factor_text,
    indices_text,
    perplexity_text,
    size_text,
    summary,
)

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


class Headline(NamedTuple):
    """One of the large numbers at the top of the page.

    Attributes:
        label: What it is.
        value: The number, with its unit.
        detail: What it is made of; may be empty.
    """

    label: str
    value: str
    detail: str


class Phase(NamedTuple):
    """Wall-clock time of one phase.

    Attributes:
        name: What was done.
        duration: Time, as text.
        share: Part of the longest phase, in percent, for the bar.
    """

    name: str
    duration: str
    share: float


class RankRow(NamedTuple):
    """One replaced linear in the table of ranks; empty text where scores are missing.

    Attributes:
        layer: Index of its decoder layer, -1 if it is in none.
        kind: Name inside the layer.
        rank: Rank of its factors.
        num_components: Number of its singular components.
        kept_score: Share of the sum of scores that is kept.
        kept_energy: Share of the squared Frobenius norm that is kept.
        num_beyond: Number of kept components that plain truncation would remove.
        predicted_loss: Nats per token that its truncation is predicted to cost.
        measured_loss: What it does to the predictions by itself; empty if it was not measured.
    """

    layer: int
    kind: str
    rank: int
    num_components: str = ""
    kept_score: str = ""
    kept_energy: str = ""
    num_beyond: str = ""
    predicted_loss: str = ""
    measured_loss: str = ""


class ChannelRow(NamedTuple):
    """One narrowed MLP in the table of channels; empty text where its original width is unknown.

    Attributes:
        layer: Index of its decoder layer, -1 if it is in none.
        kind: Name, inside the layer, of the linear that reads the channels.
        kept: Number of kept channels.
        num_channels: Number of channels before.
        kept_share: Share that is kept.
        predicted_loss: Nats per token that the removal of the others is predicted to cost; empty
            if the method does not predict it.
        measured_loss: What it does to the predictions by itself; empty if it was not measured.
    """

    layer: int
    kind: str
    kept: int
    num_channels: str = ""
    kept_share: str = ""
    predicted_loss: str = ""
    measured_loss: str = ""


class RemovalRow(NamedTuple):
    """One removed layer or block in the table of removals.

    Attributes:
        layer: Index of the decoder layer.
        kind: What went: layer, attention or mlp.
        loss: Nats per token that its removal by itself costs.
    """

    layer: int
    kind: str
    loss: str


def render_report(
    metrics: Metrics,
    plan: Plan,
    scores: Mapping[str, Tensor],
    config: Mapping[str, Any],  # Any: values of YAML
) -> str:
    """Return the page that tells what a run did, and what it cost.

    Args:
        metrics: Numbers of the run.
        plan: Its decisions.
        scores: Content of its scores.safetensors; may be empty.
        config: Resolved configuration, nested, of plain values.

    Returns:
        A complete HTML document; equal inputs give equal text.
    """
    return render_page(
        "report.html.jinja",
        metrics,
        config,
        run_plots(metrics, plan, scores),
        summary=summary(metrics),
        headlines=_headlines(metrics),
        rows=comparison_rows(metrics),
        notes=comparison_notes(metrics),
        phases=phase_bars(metrics, _PHASES),
        ranks=_rank_rows(plan, scores),
        channels=_channel_rows(metrics, plan, scores),
        removals=[
            RemovalRow(*module_place(name), f"{loss:.4f}")
            for name, loss in removed_parts(plan, scores).items()
        ],
    )


def render_page(
    template: str,
    metrics: Metrics | CompensationMetrics,
    config: Mapping[str, Any],  # Any: values of YAML
    plots: Iterable[Plot],
    **content: object,
) -> str:
    """Return a page made of base.html.jinja: the parts that every command's report has.

    Args:
        template: File in this package that extends base.html.jinja.
        metrics: Numbers of the run.
        config: Resolved configuration, nested, of plain values.
        plots: Drawings in reading order; without any, their section is left out.
        **content: The other values of the template.

    Returns:
        A complete HTML document; equal inputs give equal text.
    """
    environment = Environment(
        loader=PackageLoader("grasp_lightning", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        metrics=metrics,
        plots=[(plot, _data_uri(plot)) for plot in plots],
        evaluation=evaluation.section_rows(metrics.evaluation) if metrics.evaluation else [],
        throughput=throughput.section_rows(metrics.throughput) if metrics.throughput else [],
        throughput_reference=metrics.throughput["models"][0]["name"] if metrics.throughput else "",
        total=duration_text(metrics.seconds.total),
        settings=yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=False),
        **content,
    )


def perplexity_headline(before: float | None, after: float | None) -> Headline:
    """Return by which factor the perplexity changed."""
    return Headline(
        "Perplexity",
        factor_text(before, after) or NOT_MEASURED,
        f"{perplexity_text(before)} \u2192 {perplexity_text(after)}",
    )


def time_headlines(metrics: Metrics | CompensationMetrics) -> list[Headline]:
    """Return how long the command took; nothing if that was not measured."""
    if metrics.seconds.total is None:
        return []
    memory = metrics.peak_memory_bytes
    detail = "" if memory is None else f"{size_text(memory)} at its peak"
    return [Headline("Time", duration_text(metrics.seconds.total), detail)]


def phase_bars(metrics: Metrics | CompensationMetrics, phases: Mapping[str, str]) -> list[Phase]:
    """Return the time of every phase that the run had.

    Args:
        metrics: Numbers of the run.
        phases: What was done, by name of the phase, in the order of the page.

    Returns:
        One bar per phase, relative to the longest.
    """
    times = {
        name: seconds
        for phase, name in phases.items()
        if (seconds := getattr(metrics.seconds, phase)) is not None
    }
    longest = max(times.values(), default=0.0) or 1.0
    return [
        Phase(name, duration_text(seconds), round(100 * seconds / longest, 1))
        for name, seconds in times.items()
    ]


def _headlines(metrics: Metrics) -> list[Headline]:
    parameters = metrics.parameters
    return [
        Headline(
            "Parameters removed",
            f"{metrics.removed_ratio:.1%}",
            f"{count_text(parameters.dense)} \u2192 {count_text(parameters.compressed)}",
        ),
        Headline(
            f"Size at {metrics.dtype}",
            size_text(metrics.bytes.compressed),
            f"from {size_text(metrics.bytes.dense)}",
        ),
        perplexity_headline(metrics.perplexity.dense, metrics.perplexity.compressed),
        Headline(
            f"Layers {done_to_layers(metrics.method)}",
            str(len(metrics.layers)),
            indices_text(metrics.layers),
        ),
        *time_headlines(metrics),
    ]


def _rank_rows(plan: Plan, scores: Mapping[str, Tensor]) -> list[RankRow]:
    rows = {}
    for operation in plan.operations:
        if isinstance(operation, FactorizeLinear):
            layer, kind = module_place(operation.module)
            rows[operation.module] = RankRow(layer, kind, operation.rank)
    for linear in scored_linears(plan, scores):
        rows[linear.module] = rows[linear.module]._replace(
            num_components=str(len(linear.scores)),
            kept_score=f"{linear.kept_score:.1%}",
            kept_energy=f"{linear.kept_energy:.1%}",
            num_beyond=str(linear.num_beyond_largest),
        )
    losses = predicted_losses(plan, scores)
    for module in plan.ranks.keys() & losses.keys():
        rows[module] = rows[module]._replace(
            num_components=str(len(scores[f"{module}.scores"])),
            predicted_loss=f"{losses[module]:.4f}",
            measured_loss=_measured_text(module, scores),
        )
    return list(rows.values())


def _channel_rows(metrics: Metrics, plan: Plan, scores: Mapping[str, Tensor]) -> list[ChannelRow]:
    rows, losses = [], predicted_losses(plan, scores)
    for reader, kept in plan.channels.items():
        row = ChannelRow(*module_place(reader), kept)
        if reader in metrics.channels:
            num_channels = metrics.channels[reader].dense
            share = f"{kept / num_channels:.1%}"
            row = row._replace(num_channels=str(num_channels), kept_share=share)
        if reader in losses:
            row = row._replace(
                predicted_loss=f"{losses[reader]:.4f}",
                measured_loss=_measured_text(reader, scores),
            )
        rows.append(row)
    return rows


def _measured_text(module: str, scores: Mapping[str, Tensor]) -> str:
    measured = scores.get(f"{module}.measured")
    return "" if measured is None else f"{float(measured):.4f}"


def _data_uri(plot: Plot) -> str:
    # An image of its own keeps the identifiers of one SVG apart from those of the next.
    return "data:image/svg+xml;base64," + base64.b64encode(plot.svg.encode()).decode()
