"""Plots of a grid: quality against the removed share, and against speed."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from grasp_lightning.evaluation.throughput import Spread
from grasp_lightning.reporting.comparison.entries import Entry, entries, same_but_seed, texts
from grasp_lightning.reporting.comparison.results import Comparison
from grasp_lightning.reporting.drawing import BLACK, COLOURS, Plot, svg_text
from grasp_lightning.reporting.tables import perplexity_text

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # not a multiple of the number of colours
_PERCENT = 100
_PANEL_HEIGHT, _LEGEND_ROW = 3.1, 0.24  # inches
_LEGEND_COLUMNS = 4
_SUBS = (1.0, 2.0, 5.0)


class Point(NamedTuple):
    """The cells that differ only in their seed, as means over the seeds."""

    model: str
    label: str
    requested: float | None
    x: float
    y: float


class Panel(NamedTuple):
    """One drawing of points; the dense model is a dashed line or, with speeds, a point at 1."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    dense: float | None


def comparison_plots(comparison: Comparison) -> dict[str, Plot]:
    """Return the plots for which there is data, by file name; equal grids give equal bytes."""
    found = entries(comparison)
    plots = {
        "perplexity.svg": _perplexity_plot(found),
        "accuracy.svg": _accuracy_plot(found),
        "speed.svg": _speed_plot(found),
    }
    return {name: plot for name, plot in plots.items() if plot is not None}


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both speed (x) and perplexity (y), fastest first."""
    line: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.x, point.y)):
        if not line or point.y < line[-1].y:
            line.append(point)
    return line


def _perplexity_plot(of: Sequence[Entry]) -> Plot | None:
    def panel(model: str, text: str) -> Panel:
        value = _perplexity(text)
        return Panel(
            title=_title(of, model, text),
            x_label="parameters removed, %",
            y_label="perplexity (log scale)",
            points=_points(of, model, _removed, value),
            dense=_dense(of, model, value),
        )

    panels = [[panel(model, text) for text in texts(of)] for model in _models(of)]
    drawn = [panel for row in panels for panel in row if panel.points]
    if not drawn:
        return None
    best, share = _best(drawn[0].points)
    return Plot(
        title=f"{best.label} has the lowest perplexity on {texts(of)[0]}{share}: "
        f"{perplexity_text(best.y)}",
        explanation="Perplexity against the share of all parameters that is removed; lower is "
        f"better. Dashed line: the dense model.{_without_zeros(of)}",
        alt=_alt(drawn[0], "perplexity"),
        svg=_svg(panels, _labels(of), _draw_shares, is_logarithmic=True),
    )


def _accuracy_plot(of: Sequence[Entry]) -> Plot | None:
    def mean(entry: Entry) -> float | None:
        return None if entry.task_mean is None else _PERCENT * entry.task_mean.value

    panels = [
        Panel(
            title=model if len(_models(of)) > 1 else "",
            x_label="parameters removed, %",
            y_label="mean accuracy, %",
            points=_points(of, model, _removed, mean),
            dense=_dense(of, model, mean),
        )
        for model in _models(of)
    ]
    drawn = [panel for panel in panels if panel.points]
    if not drawn:
        return None
    best, share = _best(drawn[0].points, is_higher_better=True)
    return Plot(
        title=f"{best.label} has the highest mean accuracy{share}: {best.y:.1f}%",
        explanation=f"Mean over {len(of[0].mean_tasks)} tasks against the share of all parameters "
        f"that is removed; higher is better. Dashed line: the dense model.{_without_zeros(of)}",
        alt=_alt(drawn[0], "mean accuracy"),
        svg=_svg([[panel] for panel in panels], _labels(of), _draw_shares, is_logarithmic=False),
    )


def _speed_plot(of: Sequence[Entry]) -> Plot | None:
    if not texts(of):
        return None
    text = texts(of)[0]

    def panel(model: str, kind: str) -> Panel:
        return Panel(
            title=_title(of, model, kind),
            x_label="speed relative to the dense model",
            y_label=f"perplexity on {text} (log scale)",
            points=_points(of, model, _speed(kind), _perplexity(text)),
            dense=_dense(of, model, _perplexity(text)),
        )

    panels = [[panel(model, kind) for kind in ("prefill", "decode")] for model in _models(of)]
    drawn = [panel for row in panels for panel in row if panel.points]
    if not drawn:
        return None
    line = pareto(drawn[0].points)
    return Plot(
        title=f"{len(line)} of {len(drawn[0].points)} cells are on the Pareto line of "
        f"{drawn[0].title}",
        explanation=f"Perplexity on {text} against speed. The line joins the cells that no other "
        "cell beats in both; right and down is better. Cross: the dense model.",
        alt=_alt(drawn[0], "perplexity"),
        svg=_svg(panels, _labels(of), _draw_speeds, is_logarithmic=True),
    )


def _points(
    of: Sequence[Entry],
    model: str,
    x: Callable[[Entry], float | None],
    y: Callable[[Entry], float | None],
) -> tuple[Point, ...]:
    """Return the compressed cells of a model that have both values, as means over the seeds."""
    points = []
    for group in same_but_seed([e for e in of if e.cell.model == model and not e.cell.is_dense]):
        pairs = [(x(entry), y(entry)) for entry in group]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if known:
            means = (statistics.fmean(values) for values in zip(*known, strict=True))
            points.append(Point(model, group[0].label, group[0].cell.removed_ratio, *means))
    return tuple(points)


def _dense(of: Iterable[Entry], model: str, value: Callable[[Entry], float | None]) -> float | None:
    values = (value(e) for e in of if e.cell.model == model and e.cell.is_dense)
    return next((found for found in values if found is not None), None)


def _removed(entry: Entry) -> float | None:
    """Return the removed share in percent; None for models with zeros, which are no smaller."""
    removed = None if entry.cell.zeros else entry.cell.removed
    return None if removed is None else _PERCENT * removed


def _without_zeros(of: Iterable[Entry]) -> str:
    """Return a sentence on the models that are not drawn, empty if there are none."""
    has_zeros = any(entry.cell.zeros for entry in of)
    return " Models that only have zeros are not drawn: they remove nothing." if has_zeros else ""


def _perplexity(text: str) -> Callable[[Entry], float | None]:
    return lambda entry: entry.cell.perplexity.get(text)


def _speed(kind: str) -> Callable[[Entry], float | None]:
    def median(entry: Entry) -> float | None:
        spread: Spread | None = getattr(entry.cell, kind)
        return None if spread is None else spread.median

    return median


def _models(of: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.cell.model for entry in of))


def _labels(of: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.label for entry in of if not entry.cell.is_dense))


def _title(of: Sequence[Entry], model: str, name: str) -> str:
    return f"{model}, {name}" if len(_models(of)) > 1 else name


def _best(points: Sequence[Point], *, is_higher_better: bool = False) -> tuple[Point, str]:
    """Return the best point at the largest share that most methods have, and that share."""
    counts: dict[float, int] = {}
    for point in points:
        if point.requested is not None:
            counts[point.requested] = counts.get(point.requested, 0) + 1
    shared = max(counts, key=lambda share: (counts[share], share)) if counts else None
    rivals = [point for point in points if shared is None or point.requested == shared]
    best = max(rivals, key=lambda point: point.y if is_higher_better else -point.y)
    return best, "" if shared is None else f" at {_PERCENT * shared:g}% removed"


def _alt(panel: Panel, quantity: str) -> str:
    points = "; ".join(f"{point.label} {point.x:.4g}, {point.y:.4g}" for point in panel.points)
    dense = "" if panel.dense is None else f" Dense: {panel.dense:.4g}."
    return f"Plot of {quantity} over {panel.x_label}.{dense} Points: {points}."


def _svg(
    panels: Sequence[Sequence[Panel]],
    labels: Sequence[str],
    draw_panel: Callable[[Axes, Panel, Mapping[str, tuple[str, str]]], None],
    *,
    is_logarithmic: bool,
) -> str:
    looks = {
        label: (COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)])
        for place, label in enumerate(labels)
    }

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharey="row")
        for axes, panel in zip(grid.flat, (p for row in panels for p in row), strict=True):
            axes.set(xlabel=panel.x_label, ylabel=_plain(panel.y_label))
            axes.set_title(_plain(panel.title))
            axes.label_outer()
            axes.grid(visible=True)
            if is_logarithmic:
                _set_logarithmic(axes)
            draw_panel(axes, panel, looks)
        handles = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=_LEGEND_COLUMNS
        )

    legend_rows = -(-(len(labels) + 1) // _LEGEND_COLUMNS)
    return svg_text(_PANEL_HEIGHT * len(panels) + _LEGEND_ROW * legend_rows + 0.2, draw)


def _plain(text: str) -> str:
    """Return a text that matplotlib shows as it is: no formula, and no hidden legend entry."""
    return re.sub(r"^_", " _", text.replace("$", r"\$"))


def _set_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=_SUBS, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_shares(axes: Axes, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    """Draw a line per method, and the dense model as a dashed line."""
    if panel.dense is not None:
        axes.axhline(panel.dense, color=BLACK, linestyle="--", linewidth=1, label="dense")
    for label, (colour, marker) in looks.items():
        points = sorted((p.x, p.y) for p in panel.points if p.label == label)
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(
                x, y, color=colour, marker=marker, markersize=5, linewidth=1.4, label=_plain(label)
            )


def _draw_speeds(axes: Axes, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    """Draw a point per cell, the dense model as a cross, and the Pareto line."""
    if not panel.points:
        return
    if panel.dense is not None:
        axes.scatter([1.0], [panel.dense], s=60, color=BLACK, marker="+", label="dense")
    line = pareto(panel.points)
    axes.plot(
        [point.x for point in line],
        [point.y for point in line],
        color="#888888",
        linewidth=1.2,
        zorder=1,
        label="Pareto line",
    )
    for label, (colour, marker) in looks.items():
        points = [p for p in panel.points if p.label == label]
        if points:
            x, y = [p.x for p in points], [p.y for p in points]
            axes.scatter(x, y, s=34, color=colour, marker=marker, label=_plain(label))
