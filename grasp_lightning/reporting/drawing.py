"""Drawing with matplotlib's object interface: no pyplot, no global state, no display."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from grasp_lightning.reporting.linears import Array
from grasp_lightning.reporting.metrics import History
from grasp_lightning.reporting.tables import count_text

_DPI = 220  # of what is drawn as pixels
WIDTH = 9.2  # inches; 883 CSS pixels, so that text of 10 points is legible at 100 %
# Okabe and Ito's palette, which stays apart for colour-blind readers.
CHOSEN, OTHER, REST, LINE = "#D55E00", "#56B4E9", "#BBBBBB", "#0072B2"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK = "#000000"
_TWO_DECADES = 100
_MAX_ANNOTATED = 20  # columns of a heat map whose fields show their numbers
STYLE: dict[str, object] = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 10,
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
}
# A fixed salt, and no date below: equal runs give equal pages.
_SVG_STYLE: dict[str, object] = {
    "figure.constrained_layout.h_pad": 0.07,
    "svg.hashsalt": "grasp_lightning",
}


class Plot(NamedTuple):
    """A drawing as SVG, with its finding (title), how to read it, and a description (alt)."""

    title: str
    explanation: str
    alt: str
    svg: str


def svg_text(height: float, draw: Callable[[Figure], None]) -> str:
    """Return a figure of ``height`` inches as SVG, with outlined text: it needs no fonts."""
    with style.context(["default", STYLE, _SVG_STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=_DPI)
        draw(figure)
        text = io.StringIO()
        # savefig would draw twice: first only to lay out, which drawing does, too.
        canvas: Any = FigureCanvasSVG(figure)  # Any: untyped there
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def draw_stacked_bars(figure: Figure, inside: Array, outside: Array) -> None:
    """Draw a dense and a compressed bar, each of decoder linears and others, both ``(2,)``."""
    axes = figure.subplots()
    total = inside + outside
    for widths, left, colour, label in (
        (inside, 0 * inside, OTHER, "decoder linears"),
        (outside, inside, REST, "embeddings, norms, output head"),
    ):
        bars = axes.barh([0, 1], widths, left=left, height=0.66, color=colour, label=label)
        labels = [count_text(int(n)) if n > 0.06 * total.max() else "" for n in widths]
        axes.bar_label(bars, labels=labels, label_type="center")
    axes.bar_label(bars, labels=[count_text(int(n)) for n in total], padding=6, fontweight="bold")
    axes.set_yticks([0, 1], labels=["dense", "compressed"])
    axes.set_xlim(0, 1.1 * total.max())
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2)


def draw_layer_bars(
    figure: Figure, heights: Array, chosen: Iterable[int], *, bottom: float = 0
) -> Axes:
    """Draw a bar per decoder layer ``(L,)`` from ``bottom``, the chosen ones in another colour."""
    axes = figure.subplots()
    axes.grid(visible=True, axis="y")
    index = np.arange(len(heights))
    is_chosen = np.isin(index, list(chosen))
    for mask, colour, label in ((~is_chosen, OTHER, "not chosen"), (is_chosen, CHOSEN, "chosen")):
        shown = heights[mask] - bottom
        axes.bar(index[mask], shown, bottom=bottom, width=0.78, color=colour, label=label)
    axes.set_xlim(-0.7, len(heights) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=32, integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside upper right", ncols=2)
    return axes


def draw_components(axes: Axes, values: Array, scores: Array, components: Iterable[int]) -> None:
    """Draw scores over singular values, both ``(K,)``, on log axes; kept components are coloured.

    Zeros are drawn at half the smallest positive value.
    """
    is_kept = np.isin(np.arange(len(values)), list(components))
    x, y = _positive(values), _positive(scores)
    for mask, colour, size, label in (
        (~is_kept, OTHER, 5, "removed component"),
        (is_kept, CHOSEN, 9, "kept component"),
    ):
        # Thousands of points: as vectors they would make the page several megabytes.
        axes.scatter(x[mask], y[mask], s=size, c=colour, linewidths=0, label=label, rasterized=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, drawn in ((axes.xaxis, x), (axes.yaxis, y)):
        # Minor ticks take half of the drawing time, and their labels run into each other.
        axis.set_minor_locator(NullLocator())
        if drawn.max() < _TWO_DECADES * drawn.min():
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(visible=True, axis="both")


def draw_heat_map(
    figure: Figure, values: Array, columns: Sequence[str], rows: Sequence[str], label: str
) -> None:
    """Draw non-negative values ``(rows, columns)`` as colours, NaN as an empty field."""
    axes = figure.subplots()
    axes.set_facecolor("#EEEEEE")
    image = axes.pcolormesh(values, cmap="cividis", vmin=0, edgecolors="white", linewidth=1.5)
    axes.set_xticks(np.arange(len(columns)) + 0.5, labels=columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, labels=rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("decoder layer")
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    middle = np.nanmax(values) / 2
    for (row, column), value in np.ndenumerate(values):
        if len(columns) <= _MAX_ANNOTATED and np.isfinite(value):
            place, colour = (column + 0.5, row + 0.5), "black" if value > middle else "white"
            axes.text(*place, f"{value:.0f}", ha="center", va="center", color=colour)


def draw_training(figure: Figure, history: History, *, window: int, kept_step: int | None) -> None:
    """Draw training losses, their moving mean over a window larger than 1, and validation losses.

    A line marks the step whose weights were kept.
    """
    axes = figure.subplots()
    axes.grid(visible=True, axis="y")
    # Thousands of points: as vectors they would make the page several megabytes.
    steps, loss, label = history.steps, np.array(history.loss), "training, one step"
    axes.scatter(steps, loss, s=7, c=OTHER, linewidths=0, label=label, rasterized=True)
    mean_label = f"training, mean of {window} steps" if window > 1 else None
    axes.plot(steps, moving_mean(loss, window), color=LINE, linewidth=1.4, label=mean_label)
    if history.validation_steps:
        points = history.validation_steps, history.validation_loss
        axes.plot(*points, color=CHOSEN, marker="o", markersize=4.5, label="validation")
    if kept_step is not None:
        axes.axvline(kept_step, color="black", linewidth=0.9, linestyle=(0, (4, 3)), label="kept")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss in nats per predicted token")
    figure.legend(loc="outside upper right", ncols=4)


def draw_errors(figure: Figure, layers: Sequence[int], before: Array, after: Array) -> None:
    """Draw two values of each layer, ``(L,)``, before and after training."""
    axes = figure.subplots()
    axes.grid(visible=True, axis="y")
    for values, colour, label in ((before, OTHER, "before"), (after, CHOSEN, "after")):
        axes.plot(layers, values, color=colour, marker="o", markersize=4.5, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("relative squared error")
    figure.legend(loc="outside upper right", ncols=2)


def moving_mean(values: Array, window: int) -> Array:
    """Return the mean around each value ``(N,)``, over fewer values at the ends."""
    weights = np.ones(window)
    counts = np.convolve(np.ones(len(values)), weights, mode="same")
    return np.convolve(values, weights, mode="same") / counts


def _positive(values: Array) -> Array:
    """Return values with zeros raised to half the smallest positive one, for a log axis."""
    positive = values[values > 0]
    return np.maximum(values, positive.min() / 2 if positive.size else 1.0)
