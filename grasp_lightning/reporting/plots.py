"""The plots of one run: which there are, what they show, and the finding that each one states."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from grasp_lightning.plan import NarrowMlp, Plan
from grasp_lightning.reporting.drawing import (
    draw_components,
    draw_heat_map,
    draw_layer_bars,
    draw_stacked_bars,
    svg_text,
)
from grasp_lightning.reporting.linears import (
    Array,
    float64_array,
    module_place,
    predicted_losses,
    scored_linears,
)
from grasp_lightning.reporting.metrics import Metrics
from grasp_lightning.reporting.tables import count_text, indices_text

_MAX_PANELS = 8
_MAX_ANNOTATED = 20


class Plot(NamedTuple):
    """A drawing with the words that go with it.

    Attributes:
        title: The finding, as a sentence without its full stop.
        explanation: One or two sentences on how to read the plot.
        alt: What a reader who does not see the plot should know.
        svg: The drawing, an SVG document.
    """

    title: str
    explanation: str
    alt: str
    svg: str


def run_plots(metrics: Metrics, plan: Plan, scores: Mapping[str, Tensor]) -> tuple[Plot, ...]:
    """Return every plot that the run has data for.

    Args:
        metrics: Numbers of the run.
        plan: Its decisions.
        scores: Content of its scores.safetensors; may be empty.

    Returns:
        Plots in reading order; parts that a method does not have are left out.
    """
    plots = (
        parameters_plot(metrics),
        layers_plot(plan, scores),
        components_plot(plan, scores),
        ranks_plot(plan),
        widths_plot(metrics, plan),
        losses_plot(plan, scores),
    )
    return tuple(plot for plot in plots if plot is not None)


def parameters_plot(metrics: Metrics) -> Plot:
    """Return the parameters before and after, decoder linears apart from all others.

    Args:
        metrics: Numbers of the run.

    Returns:
        Two stacked bars.
    """
    total, linears = metrics.parameters, metrics.decoder_linears.parameters
    inside = np.array([linears.dense, linears.compressed], dtype=float)
    outside = np.array([total.dense, total.compressed], dtype=float) - inside

    def draw(figure: Figure) -> None:
        draw_stacked_bars(figure, inside, outside, lambda value: count_text(round(value)))

    explanation = "Only linears inside decoder layers change; everything else is kept as it was."
    # Norms of dropped layers go, too.
    if total.dense - total.compressed != linears.dense - linears.compressed:
        explanation = "Dropped layers take their norms with them; everything else is kept."
    return Plot(
        title=f"{metrics.removed_ratio:.1%} of all parameters are gone: "
        f"{count_text(total.dense)} before, {count_text(total.compressed)} after",
        explanation=explanation,
        alt=f"Two bars. Decoder linears: {linears.dense:,} parameters before, "
        f"{linears.compressed:,} after. Whole model: {total.dense:,} before, "
        f"{total.compressed:,} after.",
        svg=svg_text(1.75, draw),
    )


def layers_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return what the choice of layers was made from, with the chosen ones in another colour.

    Args:
        plan: Decisions of the run.
        scores: ``layer_similarity`` ``(L,)``, or ``layer_angular_distance`` ``(L - n + 1,)``.

    Returns:
        One bar per layer; None if layers were not measured.
    """
    chosen = plan.selected_layers or plan.dropped_layers
    if "layer_similarity" in scores:
        return _similarity_plot(float64_array(scores["layer_similarity"]), chosen)
    if "layer_angular_distance" in scores:
        return _angular_plot(float64_array(scores["layer_angular_distance"]), chosen)
    return None


def _similarity_plot(similarity: Array, chosen: tuple[int, ...]) -> Plot:
    # Most layers lie close to 1: bars from zero would hide every difference that the choice used.
    low, high = float(similarity.min()), float(similarity.max())
    bottom = float(np.floor((low - 0.05 * (1 - low) - 0.01) * 20) / 20)
    is_chosen = np.isin(np.arange(len(similarity)), chosen)
    threshold = float(similarity[is_chosen].min()) if chosen else None

    def draw(figure: Figure) -> None:
        axes = draw_layer_bars(figure, similarity, chosen, bottom=bottom)
        axes.set_ylim(bottom, max(1.0, high))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("cosine similarity")
        if threshold is not None:
            axes.axhline(threshold, color="black", linewidth=0.9, linestyle=(0, (4, 3)))

    title = f"Chosen layers: {indices_text(chosen)}"
    if threshold is not None and (similarity[~is_chosen] <= threshold).all():
        title = f"Layers {indices_text(chosen)} turn their input least"
        if len(chosen) == 1:
            title = f"Layer {chosen[0]} turns its input least"
    cut = f" Dashed: {threshold:.3f}, the least similar chosen layer." if chosen else ""
    return Plot(
        title=title,
        explanation="Mean cosine similarity between what enters and what leaves each decoder "
        f"layer; high means redundant.{cut} The axis starts at {bottom:.2f}.",
        alt=f"Bars of the similarity of {len(similarity)} layers, {low:.3f} to {high:.3f}. "
        f"Chosen: {indices_text(chosen)}.",
        svg=svg_text(3.3, draw),
    )


def _angular_plot(distance: Array, chosen: tuple[int, ...]) -> Plot:
    def draw(figure: Figure) -> None:
        axes = draw_layer_bars(figure, distance, chosen[:1])
        axes.set_xlabel("first layer of the span")
        axes.set_ylabel("angular distance")

    title = f"Chosen layers: {indices_text(chosen)}"
    if chosen and distance[chosen[0]] == distance.min():
        title = f"Layers {indices_text(chosen)} together turn their input least"
    return Plot(
        title=title,
        explanation="Mean angle, as a share of pi, between what enters and what leaves a span of "
        f"{len(chosen)} layers, for every start of the span; the smallest is chosen.",
        alt=f"Bars of the angular distance of {len(distance)} spans, {distance.min():.3f} to "
        f"{distance.max():.3f}. Chosen: layers {indices_text(chosen)}.",
        svg=svg_text(3.3, draw),
    )


def components_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return score against singular value, for one linear of each kind.

    The linears are those of the middle one of the replaced layers.

    Args:
        plan: Decisions of the run.
        scores: ``<module>.scores`` and ``<module>.singular_values``, each ``(K,)``.

    Returns:
        Small multiples with logarithmic axes; None if components were not scored and selected.
    """
    linears = scored_linears(plan, scores)
    if not linears:
        return None
    layers = sorted({linear.layer for linear in linears})
    layer = layers[len(layers) // 2]
    panels = [linear for linear in linears if linear.layer == layer][:_MAX_PANELS]
    num_columns = min(4, len(panels))
    num_rows = -(-len(panels) // num_columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes, linear in zip(grid.flat, panels, strict=False):
            draw_components(axes, linear.singular_values, linear.scores, linear.components)
            axes.set_title(linear.kind.rsplit(".", 1)[-1])
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        figure.supxlabel("singular value", fontsize=10)
        figure.supylabel("score", fontsize=10)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, markerscale=2)

    num_kept = sum(len(linear.components) for linear in linears)
    num_beyond = sum(linear.num_beyond_largest for linear in linears)
    num_zero = sum(int((linear.scores <= 0).sum()) for linear in panels)
    title = "The kept components are those with the largest singular values"
    if num_beyond > 0:
        share = f"{num_beyond / num_kept:.0%}"
        title = f"{share} of the kept components are not among the largest singular values"
    note = f" Scores of zero ({num_zero}) are drawn at the lower edge." if num_zero else ""
    return Plot(
        title=title,
        explanation="Each point is a singular component: how large it is against how much the loss "
        "depends on it. Plain truncation would keep the rightmost points of each panel. "
        f"Shown: layer {layer}; the title counts all linears.{note}",
        alt=f"Scatter plots of {len(panels)} linears of layer {layer}, logarithmic axes. Over all "
        f"{len(linears)} linears {num_kept} components are kept, {num_beyond} of them beyond the "
        "largest singular values.",
        svg=svg_text(0.6 + 2.35 * num_rows, draw),
    )


def ranks_plot(plan: Plan) -> Plot | None:
    """Return the rank of every replaced linear.

    Args:
        plan: Decisions of the run.

    Returns:
        A heat map, linear kinds by layers; None if no linear was replaced.
    """
    ranks = {module_place(module): rank for module, rank in plan.ranks.items()}
    if not ranks:
        return None
    drawn = _heat_map(ranks, "rank", plan)
    num_layers = len({layer for layer, _ in ranks})
    linears = "1 linear" if len(ranks) == 1 else f"{len(ranks)} linears"
    verb = "has" if len(ranks) == 1 else "have"
    layers = "1 layer" if num_layers == 1 else f"{num_layers} layers"
    low, high = min(ranks.values()), max(ranks.values())
    span = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return Plot(
        title=f"{linears} in {layers} now {verb} {span}",
        explanation=f"Rank of the factors that replace each linear; {_grey(plan)}.",
        alt=f"Heat map of ranks, {drawn.size}; the table of ranks has the same numbers.",
        svg=drawn.svg,
    )


def widths_plot(metrics: Metrics, plan: Plan) -> Plot | None:
    """Return which share of its channels every linear of a narrowed MLP has kept.

    Args:
        metrics: Numbers of the run: how many channels there were.
        plan: Its decisions.

    Returns:
        A heat map, linear kinds by layers; None if no MLP was narrowed, or it is not known how many
        channels there were.
    """
    narrowed = [op for op in plan.operations if isinstance(op, NarrowMlp)]
    kept = {
        op.reader: len(op.channels) / metrics.channels[op.reader].dense
        for op in narrowed
        if op.reader in metrics.channels
    }
    shares = {
        module_place(module): kept[op.reader]
        for op in narrowed
        if op.reader in kept
        for module in (*op.writers, op.reader)
    }
    if not shares:
        return None
    percent = {place: round(100 * share, 1) for place, share in shares.items()}
    drawn = _heat_map(percent, "% kept", plan)
    low, high = (f"{share:.0%}" for share in (min(kept.values()), max(kept.values())))
    span = low if low == high else f"{low} to {high}"
    noun = "1 MLP keeps" if len(kept) == 1 else f"{len(kept)} MLPs keep"
    return Plot(
        title=f"{noun} {span} of the hidden channels",
        explanation="Share of the hidden channels that is kept, in percent, for each linear that "
        "writes or reads them; a grey field is not narrowed.",
        alt=f"Heat map of shares, {drawn.size}; the table of channels has the same numbers.",
        svg=drawn.svg,
    )


def _grey(plan: Plan) -> str:
    is_removed = plan.removed_blocks or plan.dropped_layers
    more = [" or is narrowed"] * bool(plan.channels) + [" or is gone"] * bool(is_removed)
    return f"a grey field stays dense{''.join(more)}"


def losses_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return what the truncation of every linear is predicted to cost.

    Args:
        plan: Decisions of the run.
        scores: ``<module>.scores``, each ``(K,)``.

    Returns:
        A heat map, linear kinds by layers; None if the method predicts no losses.
    """
    losses = {module_place(module): v for module, v in predicted_losses(plan, scores).items()}
    if not losses:
        return None
    # Thousandths: the total is a few tenths, over hundreds of linears.
    thousandths = {place: 1e3 * loss for place, loss in losses.items()}
    drawn = _heat_map(thousandths, "nats / 1000", plan)
    total, (worst, most) = sum(losses.values()), max(losses.items(), key=lambda entry: entry[1])
    return Plot(
        title=f"All that went is predicted to cost {total:.2f} nats per token",
        explanation="Predicted growth of the loss for each linear, in thousandths of a nat per "
        "token: half the curvature of its change; a narrowed MLP stands under the linear that "
        f"reads its channels{_removed_in_plot(plan)}; a grey field costs nothing.",
        alt=f"Heat map of predicted losses, {drawn.size}; most, {most:.4f} nats, in {worst[1]} of "
        f"layer {worst[0]}.",
        svg=drawn.svg,
    )


def _removed_in_plot(plan: Plan) -> str:
    is_removed = plan.removed_blocks or plan.dropped_layers
    row = "; a layer or block that is gone has a row of its own, with what its removal costs alone"
    return row if is_removed else ""


class _HeatMap(NamedTuple):
    """A drawing of one number for each linear, kinds of linears by layers."""

    svg: str
    size: str


def _heat_map(values: Mapping[tuple[int, str], float], label: str, plan: Plan) -> _HeatMap:
    """Draw numbers by the layer and the kind of their linears; a field without one is grey.

    All heat maps of a plan have the same layers: those with a number, and all that it cuts.
    """
    parts = (*plan.ranks, *plan.channels, *plan.removed_blocks)
    cut = {module_place(part)[0] for part in parts} | set(plan.dropped_layers)
    layers = sorted({layer for layer, _ in values} | cut)
    kinds = list(dict.fromkeys(kind for _, kind in values))
    table = np.array([[values.get((layer, kind), np.nan) for layer in layers] for kind in kinds])

    def draw(figure: Figure) -> None:
        columns = [str(layer) for layer in layers]
        is_annotated = len(layers) <= _MAX_ANNOTATED
        draw_heat_map(figure, table, columns, kinds, label=label, is_annotated=is_annotated)

    return _HeatMap(
        svg=svg_text(1.2 + 0.34 * len(kinds), draw),
        size=f"{len(kinds)} kinds of linears by {len(layers)} layers",
    )
