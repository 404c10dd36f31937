"""The plots of one run: which to draw, and the finding that each states."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from grasp_lightning.plan import Plan
from grasp_lightning.reporting import drawing
from grasp_lightning.reporting.drawing import Plot, svg_text
from grasp_lightning.reporting.heat_maps import losses_plot, ranks_plot, search_plot, widths_plot
from grasp_lightning.reporting.linears import Array, float64_array, scored_linears
from grasp_lightning.reporting.metrics import Change, History, Metrics
from grasp_lightning.reporting.tables import count_text, indices_text, loss_text, steps_text

_MAX_PANELS = 8
_IMPORTANCES = {
    "layer_taylor_scores": (
        "Taylor score",
        "Sum of |weight times gradient| over all parameters of a layer, in nats per token.",
    ),
    "layer_removal_losses": (
        "loss without the layer",
        "Cross-entropy of the model without one layer, in nats per token.",
    ),
}
_MAX_POINTS = 20  # more steps than that get a moving mean over 1/20 of them


def run_plots(metrics: Metrics, plan: Plan, scores: Mapping[str, Tensor]) -> tuple[Plot, ...]:
    """Return the plots of a compression for which there is data, in reading order."""
    plots = (
        parameters_plot(metrics),
        layers_plot(plan, scores),
        search_plot(plan, scores),
        components_plot(plan, scores),
        ranks_plot(plan),
        widths_plot(metrics, plan),
        losses_plot(plan, scores),
    )
    return tuple(plot for plot in plots if plot is not None)


def parameters_plot(metrics: Metrics) -> Plot:
    """Return the parameters before and after, with decoder linears separate."""
    total, linears = metrics.parameters, metrics.decoder_linears.parameters
    inside = np.array(linears.values, dtype=float)
    outside = np.array(total.values, dtype=float) - inside
    explanation = "Only linears inside decoder layers change; everything else is unchanged."
    # Norms of deleted layers are removed, too.
    if total.dense - total.compressed != linears.dense - linears.compressed:
        explanation = "Deleted layers include their norms; everything else is unchanged."
        if all(metrics.layer_changes.values()):
            explanation = "Embeddings, head and norms change, too."
    return Plot(
        title=f"{metrics.removed_ratio:.1%} of all parameters were removed: "
        f"{count_text(total.dense)} before, {count_text(total.compressed)} after",
        explanation=explanation,
        alt=f"Two bars. Decoder linears: {linears.dense:,} parameters before, "
        f"{linears.compressed:,} after. Whole model: {total.dense:,} before, "
        f"{total.compressed:,} after.",
        svg=svg_text(1.75, lambda figure: drawing.draw_stacked_bars(figure, inside, outside)),
    )


def layers_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return the measurement that layers were chosen by; None if there is none.

    ``scores`` has ``layer_similarity``, ``layer_taylor_scores`` or ``layer_removal_losses``
    ``(L,)``, or ``layer_angular_distance`` or ``span_similarity`` of spans of n layers,
    ``(L - n + 1,)``.
    """
    chosen = plan.selected_layers or plan.dropped_layers
    if "layer_similarity" in scores:
        return _similarity_plot(float64_array(scores["layer_similarity"]), chosen)
    if "layer_angular_distance" in scores:
        return _span_plot(float64_array(scores["layer_angular_distance"]), chosen, is_angle=True)
    if "span_similarity" in scores:
        return _span_plot(float64_array(scores["span_similarity"]), chosen, is_angle=False)
    for key, (quantity, explanation) in _IMPORTANCES.items():
        if key in scores:
            values = float64_array(scores[key])
            return _importance_plot(values, plan, quantity, explanation)
    return None


def _similarity_plot(similarity: Array, chosen: tuple[int, ...]) -> Plot:
    # Most layers are close to 1: bars from zero would hide the differences behind the choice.
    low, high = float(similarity.min()), float(similarity.max())
    bottom = float(np.floor((low - 0.05 * (1 - low) - 0.01) * 20) / 20)
    is_chosen = np.isin(np.arange(len(similarity)), chosen)
    threshold = float(similarity[is_chosen].min()) if chosen else None

    def draw(figure: Figure) -> None:
        axes = drawing.draw_layer_bars(figure, similarity, chosen, bottom=bottom)
        axes.set_ylim(bottom, max(1.0, high))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("cosine similarity")
        if threshold is not None:
            axes.axhline(threshold, color="black", linewidth=0.9, linestyle=(0, (4, 3)))

    title = f"Chosen layers: {indices_text(chosen)}"
    if threshold is not None and (similarity[~is_chosen] <= threshold).all():
        title = f"Layers {indices_text(chosen)} change their input least"
        if len(chosen) == 1:
            title = f"Layer {chosen[0]} changes its input least"
    cut = f" Dashed line: {threshold:.3f}, the least similar chosen layer." if chosen else ""
    return Plot(
        title=title,
        explanation="Mean cosine similarity between the input and the output of each decoder "
        f"layer; high means redundant.{cut} The axis starts at {bottom:.2f}.",
        alt=f"Bars of the similarity of {len(similarity)} layers, {low:.3f} to {high:.3f}. "
        f"Chosen: {indices_text(chosen)}.",
        svg=svg_text(3.3, draw),
    )


def _span_plot(values: Array, chosen: tuple[int, ...], *, is_angle: bool) -> Plot:
    name = "angular distance" if is_angle else "cosine similarity"

    def draw(figure: Figure) -> None:
        axes = drawing.draw_layer_bars(figure, values, chosen[:1])
        axes.set_xlabel("first layer of the span")
        axes.set_ylabel(name)

    title = f"Chosen layers: {indices_text(chosen)}"
    best = values.min() if is_angle else values.max()
    if chosen and values[chosen[0]] == best:
        title = f"Layers {indices_text(chosen)} together change their input least"
    return Plot(
        title=title,
        explanation=f"Mean {'angle, as a share of pi,' if is_angle else name} between the input "
        f"and the output of a span of {len(chosen)} layers, for every start of the span; the "
        f"{'smallest' if is_angle else 'largest'} is chosen.",
        alt=f"Bars of the {name} of {len(values)} spans, {values.min():.3f} to "
        f"{values.max():.3f}. Chosen: layers {indices_text(chosen)}.",
        svg=svg_text(3.3, draw),
    )


def _importance_plot(values: Array, plan: Plan, quantity: str, explanation: str) -> Plot:
    chosen = plan.selected_layers or ()
    low, high = float(values.min()), float(values.max())
    bottom = max(low - 0.2 * (high - low), 0.0)
    is_chosen = np.isin(np.arange(len(values)), chosen)
    first, last = (plan.options.get(key) for key in ("protect_first", "protect_last"))

    def draw(figure: Figure) -> None:
        axes = drawing.draw_layer_bars(figure, values, chosen, bottom=bottom)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(quantity)

    title = f"Chosen layers: {indices_text(chosen)}"
    if chosen and (values[~is_chosen] >= values[is_chosen].max()).all():
        title = f"Layers {indices_text(chosen)} have the lowest {quantity}"
    protected = f" The first {first} and the last {last} are protected." if first or last else ""
    return Plot(
        title=title,
        explanation=f"{explanation} The lowest layers are deleted.{protected} The axis starts at "
        f"{bottom:.3g}.",
        alt=f"Bars of the {quantity} of {len(values)} layers, {low:.3g} to {high:.3g}. Chosen: "
        f"{indices_text(chosen)}.",
        svg=svg_text(3.3, draw),
    )


def components_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return scores over singular values for the linears of the middle replaced layer.

    None without ``<module>.scores`` and ``<module>.singular_values``, each ``(K,)``.
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
            drawing.draw_components(axes, linear.singular_values, linear.scores, linear.components)
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
        explanation="Each point is a singular component: its size, and how much the loss depends "
        "on it. Plain truncation would keep the rightmost points of each panel. "
        f"Shown: layer {layer}; the title counts all linears.{note}",
        alt=f"Scatter plots of {len(panels)} linears of layer {layer}, logarithmic axes. Over all "
        f"{len(linears)} linears {num_kept} components are kept, {num_beyond} of them beyond the "
        "largest singular values.",
        svg=svg_text(0.6 + 2.35 * num_rows, draw),
    )


def layer_errors_plot(errors: Mapping[str, Change[float]]) -> Plot:
    """Return the error of the hidden states after each layer, before and after training.

    Args:
        errors: By the number of the layer, ascending; not empty.
    """
    before, after = (
        np.array([error.values[number] for error in errors.values()]) for number in (0, 1)
    )
    layers = [int(layer) for layer in errors]
    first, last = loss_text(float(before.mean())), loss_text(float(after.mean()))
    verb = "falls" if after.mean() < before.mean() else "rises"
    return Plot(
        title=f"Mean error of the hidden states {verb} from {first} to {last}",
        explanation="Squared error of the hidden states after each layer, relative to those of the "
        "dense model, on samples that are not trained on.",
        alt=f"Line plot of the error of the hidden states after {len(layers)} layers. After the "
        f"last one: {loss_text(before[-1])} before training, {loss_text(after[-1])} after.",
        svg=svg_text(3.0, lambda figure: drawing.draw_errors(figure, layers, before, after)),
    )


def training_plot(history: History, *, kept_step: int | None = None) -> Plot:
    """Return the training loss of every step, its moving mean, and validation losses.

    The title compares the first validation with that of the kept weights; without two validations,
    the means of the first and the last tenth of the steps.

    Raises:
        ValueError: If the history has no step.
    """
    if not history.steps:
        raise ValueError("history has no steps, so there is nothing to draw")
    window = max(1, len(history.steps) // _MAX_POINTS)

    def draw(figure: Figure) -> None:
        drawing.draw_training(figure, history, window=window, kept_step=kept_step)

    mean = f"; the line is the mean of {window} steps" if window > 1 else ""
    explanation = f"Each small point is the mean loss of one optimizer step{mean}."
    if history.validation_steps:
        explanation += " Validation uses samples that are not trained on."
    if kept_step is not None:
        explanation += f" Dashed line: step {kept_step:,}, whose weights are kept."
    return Plot(
        title=_finding(history, kept_step),
        explanation=explanation,
        alt=_alt(history),
        svg=svg_text(3.6, draw),
    )


def _finding(history: History, kept_step: int | None) -> str:
    validations = dict(zip(history.validation_steps, history.validation_loss, strict=True))
    end = history.steps[-1]
    if len(validations) > 1:
        end = kept_step if kept_step in validations else history.validation_steps[-1]
        name, first, last = "Validation", history.validation_loss[0], validations[end]
    else:
        name, num = "Training", max(1, len(history.loss) // 10)
        first, last = float(np.mean(history.loss[:num])), float(np.mean(history.loss[-num:]))
    before, after = loss_text(first), loss_text(last)
    if before == after:
        return f"{name} loss stays at {before} nats per predicted token"
    verb = "falls" if last < first else "rises"
    return (
        f"{name} loss {verb} from {before} to {after} nats per predicted token in {steps_text(end)}"
    )


def _alt(history: History) -> str:
    text = (
        f"Line plot of the training loss over {steps_text(len(history.steps))}, "
        f"{loss_text(min(history.loss))} to {loss_text(max(history.loss))}."
    )
    losses = history.validation_loss
    if not losses:
        return text
    return (
        f"{text} Validation loss: {loss_text(losses[0])} at first, {loss_text(min(losses))} at its "
        f"lowest, {loss_text(losses[-1])} at last."
    )
