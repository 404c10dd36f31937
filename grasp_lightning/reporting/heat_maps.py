"""Heat maps of one run: a number for each cut linear, kinds of linears by decoder layers."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from grasp_lightning.methods.removal import search_losses
from grasp_lightning.plan import NarrowExperts, NarrowMlp, Plan
from grasp_lightning.reporting.drawing import Plot, draw_heat_map, svg_text
from grasp_lightning.reporting.linears import module_place, predicted_losses
from grasp_lightning.reporting.metrics import Metrics


def ranks_plot(plan: Plan) -> Plot | None:
    """Return the rank of every low-rank linear; None if there is none."""
    ranks = {module_place(module): rank for module, rank in plan.ranks.items()}
    if not ranks:
        return None
    num_layers = len({layer for layer, _ in ranks})
    linears = "1 linear" if len(ranks) == 1 else f"{len(ranks)} linears"
    verb = "has" if len(ranks) == 1 else "have"
    layers = "1 layer" if num_layers == 1 else f"{num_layers} layers"
    low, high = min(ranks.values()), max(ranks.values())
    span = f"rank {low}" if low == high else f"ranks {low} to {high}"
    is_removed = plan.removed_blocks or plan.dropped_layers
    grey = ["dense"] + ["narrowed"] * bool(plan.channels) + ["removed"] * bool(is_removed)
    return _heat_map(
        ranks,
        plan,
        label="rank",
        title=f"{linears} in {layers} now {verb} {span}",
        explanation="Rank of the factors that replace each linear; linears in grey are "
        f"{' or '.join(grey)}.",
        alt=("ranks", "the table of ranks has the same numbers"),
    )


def widths_plot(metrics: Metrics, plan: Plan) -> Plot | None:
    """Return the share of channels that narrowed MLPs keep, for each linear; None if unknown."""
    readers = {
        op: op.reader if isinstance(op, NarrowMlp) else op.experts
        for op in plan.operations
        if isinstance(op, NarrowMlp | NarrowExperts)
    }
    kept = {
        op: plan.channels[reader] / metrics.channels[reader].dense
        for op, reader in readers.items()
        if reader in metrics.channels
    }
    if not kept:
        return None
    percent = {
        module_place(module): round(100 * share, 1)
        for op, share in kept.items()
        for module in op.modules
    }
    low, high = (f"{share:.0%}" for share in (min(kept.values()), max(kept.values())))
    span = low if low == high else f"{low} to {high}"
    noun = "1 MLP keeps" if len(kept) == 1 else f"{len(kept)} MLPs keep"
    return _heat_map(
        percent,
        plan,
        label="% kept",
        title=f"{noun} {span} of the hidden channels",
        explanation="Share of the hidden channels that is kept, in percent, for each linear that "
        "writes or reads them; linears in grey are not narrowed.",
        alt=("shares", "the table of channels has the same numbers"),
    )


def losses_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return the predicted loss of each cut, from ``<module>.scores`` ``(K,)``; None if unknown."""
    predicted = predicted_losses(plan, scores)
    losses = {module_place(m): v for m, v in predicted.items() if m not in plan.row_ranks}
    if not losses:
        return None
    total, (worst, most) = sum(predicted.values()), max(losses.items(), key=lambda entry: entry[1])
    more = "; a removed layer or block has its own row, with the measured cost of removing it alone"
    if not (plan.removed_blocks or plan.dropped_layers):
        more = ""
    if plan.row_ranks:
        more += "; rows of embedding and head are in a table below"
    return _heat_map(
        # Thousandths: the total is a few tenths, over hundreds of linears.
        {place: 1e3 * loss for place, loss in losses.items()},
        plan,
        label="nats / 1000",
        title=f"All cuts together are predicted to cost {total:.2f} nats per token",
        explanation="Predicted increase of the loss for each linear, in thousandths of a nat per "
        "token: half the curvature of its change; a narrowed MLP is shown at the linear that reads "
        f"its channels{more}; linears in grey cost nothing.",
        alt=("predicted losses", f"most, {most:.4f} nats, in {worst[1]} of layer {worst[0]}"),
    )


def search_plot(plan: Plan, scores: Mapping[str, Tensor]) -> Plot | None:
    """Return the losses that each step of a search compared; None if there was no search."""
    losses = search_losses(scores)
    if not losses:
        return None
    deleted = [index for op in plan.operations for index in op.dropped]
    best = [min(step.values()) for step in losses]
    layers = range(max(losses[0]) + 2)  # the last layer is no candidate
    # Thousandths of a nat above the best candidate of the step.
    excess = np.array(
        [
            [1e3 * (step[index] - least) if index in step else np.nan for index in layers]
            for step, least in zip(losses, best, strict=True)
        ]
    )
    columns = list(map(str, layers))
    rows = [f"{number}: layer {index}" for number, index in enumerate(deleted, 1)]

    def draw(figure: Figure) -> None:
        draw_heat_map(figure, excess, columns, rows, "nats / 1000")

    return Plot(
        title=f"The search deletes layers {', '.join(map(str, deleted))}, in this order",
        explanation="One row for each deleted layer: how much higher the loss would be without "
        "another layer instead, in thousandths of a nat per token. The loss on the calibration "
        f"text is {best[0]:.3f} after the first deletion and {best[-1]:.3f} after the last. Layers "
        "in grey were no candidates.",
        alt=f"Heat map of losses, {len(rows)} deletions by {len(columns)} layers.",
        svg=svg_text(1.2 + 0.34 * len(rows), draw),
    )


def _heat_map(
    values: Mapping[tuple[int, str], float],
    plan: Plan,
    *,
    label: str,
    title: str,
    explanation: str,
    alt: tuple[str, str],
) -> Plot:
    """Draw numbers by layer and kind of linear; a field without one is grey.

    All heat maps of a plan have the same layers. ``alt`` is what is drawn, and a remark.
    """
    parts = (*plan.ranks, *plan.channels, *plan.removed_blocks)
    cut = {module_place(part)[0] for part in parts} | set(plan.dropped_layers)
    layers = sorted({layer for layer, _ in values} | cut)
    kinds = list(dict.fromkeys(kind for _, kind in values))
    table = np.array([[values.get((layer, kind), np.nan) for layer in layers] for kind in kinds])

    def draw(figure: Figure) -> None:
        draw_heat_map(figure, table, list(map(str, layers)), kinds, label)

    size = f"{len(kinds)} kinds of linears by {len(layers)} layers"
    return Plot(
        title=title,
        explanation=explanation,
        alt=f"Heat map of {alt[0]}, {size}; {alt[1]}.",
        svg=svg_text(1.2 + 0.34 * len(kinds), draw),
    )
