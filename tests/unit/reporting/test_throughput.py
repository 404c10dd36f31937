from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from rich.console import Console

from grasp_lightning.evaluation.throughput import Throughput
from grasp_lightning.reporting.throughput import (
    draw_throughput,
    throughput_notes,
    throughput_table,
    write_throughput_plot,
)
from tests.unit.reporting.throughput_example import example_throughput, model


def printed(result: Throughput, width: int = 160) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(throughput_table(result))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_the_table_has_a_line_per_setting_and_model() -> None:
    lines = printed(example_throughput())
    assert "prefill 128 A 1,024 1,004-1,044 125.0 ms" in lines
    assert "A (again) 1,024 1,004-1,044 1.00 0.95-1.05 125.0 ms" in lines
    assert "B 1,280 1,260-1,300 1.25 1.20-1.30 100.0 ms" in lines
    assert "decode 1 A 40.0 20.0-60.0" in lines
    assert "memory A 1.00 GB" in lines
    assert "B 750.0 MB 0.75" in lines


def test_numbers_are_whole_at_eighty_columns() -> None:
    text = "\n".join(printed(example_throughput(), width=80))
    for number in ("A (again) 2,000 1,980-2,020 1.00 0.95-1.05 512.0 ms", "B 750.0 MB 0.75"):
        assert number in text


def test_the_caption_says_what_was_measured_and_how() -> None:
    notes = throughput_notes(example_throughput())
    assert notes[:2] == (
        "A: dense, 134.5 M parameters, float32",
        "B: runs/[x]/model, 134.5 M parameters, float32",
    )
    text = " ".join(notes)
    assert "of 7 rounds in random order" in text
    assert "decode N: 32 tokens after 128" in text
    assert "Some Processor, 4 cores, 2 threads, torch 2.13.0" in text
    assert "including interpreter and libraries" in text
    printed_text = " ".join(printed(example_throughput(), width=80))
    assert "B: runs/[x]/model, 134.5 M parameters, float32" in printed_text


def test_lines_of_the_plot_are_the_medians_with_quartile_bars() -> None:
    axes = Figure().subplots()
    draw_throughput(axes, example_throughput(), "decode")
    bars = [bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
    assert [bar.get_label() for bar in bars] == ["dense", "dense (again)", "runs/[x]/model"]
    medians = [np.asarray(bar.lines[0].get_ydata()).tolist() for bar in bars]
    assert medians == [[40, 160], [40, 160], [50, 200]]
    (quartiles,) = bars[2].lines[2]
    assert [segment[:, 1].tolist() for segment in quartiles.get_segments()] == [
        [30, 70],
        [180, 220],
    ]
    first, control, other = (bar.lines[0] for bar in bars)
    assert same_color(first.get_color(), control.get_color())
    assert not same_color(first.get_color(), other.get_color())
    assert (first.get_linestyle(), control.get_linestyle()) == ("-", "--")
    assert axes.get_xticks().tolist() == [1, 8]


@pytest.mark.parametrize("num_others", [0, 9])
def test_a_plot_of_any_number_of_models_is_written(tmp_path: Path, num_others: int) -> None:
    others = [model(f"runs/a-rather-long-name-{n}/model", 1.1, 10**9) for n in range(num_others)]
    models = (*example_throughput().models[:2], *others)
    before = dict(mpl.rcParams)
    write_throughput_plot(example_throughput(models=models), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before
