"""Throughput as a table for the terminal and as a plot."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from rich.table import Table

from grasp_lightning.evaluation.throughput import ModelThroughput, Spread, Throughput, Timing
from grasp_lightning.reporting.drawing import BLACK, COLOURS, STYLE, WIDTH
from grasp_lightning.reporting.tables import count_text, narrow_table, size_text

_HEIGHT = 3.6  # inches
_DPI = 150
_LEGEND_WIDTH, _LEGEND_LINE = 100, 8  # characters
_STEP = 0.05  # between the bars of two models, in powers of two
_MEMORY_NOTES = {
    "cuda": "Memory: peak that torch allocated on the device, including weights.",
    "resident": "Memory: peak resident memory of a process that runs only this model, including "
    "interpreter and libraries.",
    "resident_with_loading": "Memory: peak resident memory of a process that runs only this model, "
    "including interpreter, libraries and loading (which this system cannot exclude).",
}


def section_rows(section: Mapping[str, Any]) -> list[tuple[str, str, str]]:  # Any: values of JSON
    """Return setting, tokens per second, and ratio of the run's model, from its metrics.

    The ratio is to the first model of the benchmark, and empty for that one.
    """
    (own,) = (
        model
        for model in section["models"]
        if model["name"] == section["model"] and not model["is_control"]
    )
    rows = []
    for kind, key, unit in (("prefill", "length", "tokens"), ("decode", "batch_size", "sequences")):
        for timing in own[kind]:
            ratio, speed = timing["ratio"], timing["tokens_per_second"]["median"]
            ratio_text = "" if ratio is None else f"{ratio['median']:.2f}"
            rows.append((f"{kind}, {timing[key]} {unit}", f"{speed:,.0f}", ratio_text))
    return rows


def throughput_table(result: Throughput) -> Table:
    """Return the comparison for the terminal: settings by models, then the memory of each model.

    Models are letters, explained by the caption: names are too long for a narrow terminal.
    """
    table = narrow_table(throughput_notes(result), "Throughput")
    for heading in ("", "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "quartiles", "ratio", "quartiles", "first token"):
        table.add_column(heading, justify="right", no_wrap=True)
    models = list(zip(_letters(result), result.models, strict=True))
    for index, setting in enumerate(result.workload.settings):
        label = f"{setting.kind} {setting.size}"
        for letter, model in models:
            table.add_row(label, letter, *_cells(model.timings[index]))
            label = ""
        table.add_section()
    label, first = "memory", result.models[0].peak_memory.bytes
    for letter, model in models:
        size = model.peak_memory.bytes
        ratio = "" if model is result.models[0] else f"{size / first:.2f}"
        table.add_row(label, letter, size_text(size), "", ratio)
        label = ""
    return table


def throughput_notes(result: Throughput) -> tuple[str, ...]:
    """Return sentences on models, machine and columns."""
    workload, machine = result.workload, result.machine
    models = [
        f"{letter}: {model.name}, {count_text(model.parameters)} parameters, {model.dtype}"
        for letter, model in zip(_letters(result), result.models, strict=True)
        if not model.is_control
    ]
    rounds = "1 round" if workload.num_rounds == 1 else f"{workload.num_rounds} rounds"
    how = (
        f"Medians and quartiles of {rounds} in random order. prefill N: one prompt of N tokens; "
        f"decode N: {workload.new_tokens} tokens after {workload.prompt_length}, N sequences at "
        f"once, with cache."
    )
    control = (
        "Ratio: relative to A in the same round; above 1 is faster. A (again) is the same model "
        "loaded a second time: its difference is noise."
    )
    where = (
        f"{machine.device_name}, {machine.cores} cores, {machine.threads} threads, "
        f"torch {machine.versions['torch']}, transformers {machine.versions['transformers']}."
    )
    memory = _MEMORY_NOTES[result.models[0].peak_memory.covers]
    return *models, how, control, memory, where


def write_throughput_plot(result: Throughput, path: Path) -> None:
    """Write a PNG: prefill over prompt length, decoding over batch size."""
    # The user's matplotlib settings are neither used nor changed.
    with style.context(["default", STYLE, {"axes.grid": True}]):
        figure = Figure(figsize=(WIDTH, _HEIGHT), layout="constrained")
        prefill, decode = figure.subplots(1, 2)
        draw_throughput(prefill, result, "prefill")
        prefill.set(title="prefill, one prompt", xlabel="tokens of the prompt")
        prefill.set_ylabel("tokens per second")
        draw_throughput(decode, result, "decode")
        decode.set(title="decode with cache", xlabel="sequences at once")
        handles, labels = decode.get_legend_handles_labels()
        columns = max(1, _LEGEND_WIDTH // (max(map(len, labels)) + _LEGEND_LINE))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        figure.savefig(path, format="png", dpi=_DPI)


def draw_throughput(axes: Axes, result: Throughput, kind: str) -> None:
    """Draw tokens per second over size for each model: median and quartiles."""
    sizes: set[int] = set()
    middle = (len(result.models) - 1) / 2
    for index, (model, colour, line) in enumerate(_looks(result)):
        timings = sorted(model.of_kind(kind), key=lambda timing: timing.setting.size)
        spreads = [timing.tokens_per_second for timing in timings]
        x = [timing.setting.size for timing in timings]
        below = [spread.median - spread.first_quartile for spread in spreads]
        above = [spread.third_quartile - spread.median for spread in spreads]
        axes.errorbar(
            [size * 2 ** (_STEP * (index - middle)) for size in x],  # side by side
            [spread.median for spread in spreads],
            yerr=(below, above),
            label=model.name,
            color=colour,
            linestyle=line,
            marker="o",
            markersize=4,
            capsize=3,
        )
        sizes.update(x)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)


def _looks(result: Throughput) -> Iterator[tuple[ModelThroughput, str, str]]:
    """Yield every model with colour and line; the control has the first one's colour, dashed."""
    colours = itertools.cycle((*COLOURS, BLACK))
    first = next(colours)
    for index, model in enumerate(result.models):
        is_first = index == 0 or model.is_control
        yield model, first if is_first else next(colours), "--" if model.is_control else "-"


def _letters(result: Throughput) -> list[str]:
    """Return A, A (again), B, C, ... for the models."""
    letters: list[str] = []
    names = (letter * count for count in itertools.count(1) for letter in ascii_uppercase)
    for model in result.models:
        letters.append(f"{letters[0]} (again)" if model.is_control else next(names))
    return letters


def _cells(timing: Timing) -> tuple[str, ...]:
    ratio, wait = timing.ratio, timing.first_token_seconds
    return (
        rate_text(timing.tokens_per_second.median),
        _range_text(timing.tokens_per_second, rate_text),
        "" if ratio is None else f"{ratio.median:.2f}",
        "" if ratio is None else _range_text(ratio, lambda value: f"{value:.2f}"),
        "" if wait is None else f"{1000 * wait.median:,.1f} ms",
    )


def rate_text(rate: float) -> str:
    """Return a number of tokens per second with three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"  # noqa: PLR2004  three digits


def _range_text(spread: Spread, text: Callable[[float], str]) -> str:
    return f"{text(spread.first_quartile)}-{text(spread.third_quartile)}"
