"""Measures the linear algebra of one decoder layer of Llama-3-8B, and extrapolates to all layers.

The weights and the tokens behind the Gram matrices are random: time and memory depend on the
shapes only. Every step runs in its own process, and is appended to the output at once; steps in
the output are not repeated.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import DEFAULT_CACHE, exit_code, hardware, markdown_table, run_fresh, whole_lines
from torch import Tensor

from grasp_lightning.errors import GraspError
from grasp_lightning.evaluation.peak_memory import forget_peak, peak_bytes
from grasp_lightning.linalg.ranks import rank_for_keep_ratio
from grasp_lightning.linalg.regression import pulled_regression
from grasp_lightning.linalg.weightings import damped_cholesky
from grasp_lightning.methods.metric import Metric
from grasp_lightning.stats.moments import MomentSums, moments_of
from grasp_lightning.training.layer_refit import RIDGE, add_products

Record = dict[str, Any]  # a step, its seconds and bytes

_LAYERS = 32
_SPEEDUP = 8  # of 16 cores: half of them are assumed to be lost
# Operations per second of a data-centre GPU in float64, of which A100 and H100 have 10e12 to 60e12:
# products at half of the lower number, and singular values at the rate of small matrices.
_GPU_PRODUCTS = 5e12
_GPU_VALUES = 2e11
_POOL = 1 / 16  # share of the channels that channel removal searches at a time
_KEPT = 0.75  # of every matrix and MLP
_WINDOWS = 4
_METRIC = Metric(weighting="kfac", fisher="sampled", input_damping=1e-2)
_KINDS = _METRIC.moment_kinds
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a decoder layer.

    Attributes:
        hidden: Hidden size.
        inner: Width of the MLP.
        keys: Width of keys and values.
        tokens: Tokens that the Gram matrices are sums over.
    """

    hidden: int = 4096
    inner: int = 14336
    keys: int = 1024
    tokens: int = 8192

    def shrunk(self, by: int) -> "Shapes":
        """Return sizes divided by a number."""
        return Shapes(**{key: size // by for key, size in asdict(self).items()})

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(N, M)`` of the linears that ``grasp_plus`` measures, by name."""
        return {
            "q": (self.hidden, self.hidden),
            "k": (self.keys, self.hidden),
            "v": (self.keys, self.hidden),
            "o": (self.hidden, self.hidden),
            "down": (self.hidden, self.inner),
        }


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of call.

    Attributes:
        name: What it does, as in the table.
        linear: Which linear it is measured on; empty: the whole layer.
        times: How often a layer needs it; 0 if it is a part of another step.
    """

    name: str
    linear: str = ""
    times: int = 1


STEPS = (
    Step(name="Gram sums"),
    Step(name="Cholesky", linear="o", times=0),
    Step(name="Cholesky", linear="down", times=0),
    Step(name="singular values", linear="k", times=2),
    Step(name="singular values", linear="o", times=2),
    Step(name="SVD", linear="k", times=2),
    Step(name="refit", linear="o"),
    Step(name="narrowing", linear="down"),
    Step(name="refit", linear="down"),
    Step(name="SVD", linear="o", times=2),
    Step(name="channel removal", linear="down"),
)


def main() -> None:
    """Make the missing measurements, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for the Gram matrices")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes by this")
    arguments = parser.parse_args()
    shapes = Shapes().shrunk(arguments.shrink)
    records = [json.loads(line) for line in whole_lines(arguments.output)]
    if any(record["shapes"] != asdict(shapes) for record in records):
        raise GraspError(f"{arguments.output} has other sizes; choose another --output")
    grams = arguments.cache / f"grams-{shapes.hidden}-{shapes.inner}.pt"
    for step in STEPS:
        if any(record["step"] == asdict(step) for record in records):
            continue
        if step.linear and not grams.is_file():
            run_fresh(measure, STEPS[0], shapes, grams)
        records.append(run_fresh(measure, step, shapes, grams))
        print(_line(records[-1]), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
    print(report(records))


def measure(step: Step, shapes: Shapes, grams: Path) -> Record:
    """Run a step once.

    Args:
        step: What to run.
        shapes: Sizes of the layer.
        grams: File of the sums; the first step writes it, the others read it.

    Returns:
        The step with its CPU seconds and peak memory, interpreter and inputs included.
    """
    torch.manual_seed(0)
    work = _work(step, shapes, grams)
    forget_peak(_CPU)
    started = time.process_time()  # of all threads: other programs may run beside this one
    work()
    seconds = time.process_time() - started
    return {
        "step": asdict(step),
        "shapes": asdict(shapes),
        "seconds": seconds,
        "peak_bytes": peak_bytes(_CPU),
        "threads": torch.get_num_threads(),
    }


def _work(step: Step, shapes: Shapes, grams: Path) -> Callable[[], object]:
    """Return what a step does, with its inputs made."""
    if not step.linear:
        return lambda: _sum_grams(shapes, grams)
    sums = torch.load(grams, mmap=True, weights_only=True)
    moments = moments_of(step.linear, sums, _sources(shapes))
    rows, columns = shapes.linears[step.linear]
    weight = torch.randn(rows, columns) / columns**0.5
    assert moments.input_gram is not None  # kfac measures it
    gram = moments.input_gram.clone()
    kept = torch.randperm(columns)[: round(_KEPT * columns)].sort().values
    works: Mapping[str, Callable[[], object]] = {
        "Cholesky": lambda: damped_cholesky(gram, _METRIC.input_damping),
        "singular values": lambda: _METRIC.losses(weight, moments),
        "SVD": lambda: _METRIC.decompose(weight, moments),
        "channel removal": lambda: _METRIC.removal(weight, moments),
        "narrowing": lambda: _METRIC.narrowed(weight, moments, kept),
        "refit": lambda: _refit(step.linear, shapes),
    }
    return works[step.name]


def _sources(shapes: Shapes) -> dict[str, str]:
    return {name: "q" if name in ("k", "v") else name for name in shapes.linears}


def _sum_grams(shapes: Shapes, grams: Path) -> None:
    """Sum the Gram matrices of all linears, and write them."""
    sums = MomentSums(shapes.linears, _KINDS, _sources(shapes), _CPU)
    for _ in range(_WINDOWS):
        for name, x, gradient in _window(shapes):
            sums.add(name, x, gradient)
    sums.mean(shapes.tokens)
    grams.parent.mkdir(parents=True, exist_ok=True)
    torch.save(sums.sums, grams)


def _window(shapes: Shapes) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield a window of every linear: inputs and gradients of outputs."""
    tokens = shapes.tokens // _WINDOWS
    entering = torch.randn(tokens, shapes.hidden)
    for name, (rows, columns) in shapes.linears.items():
        shares = name in ("q", "k", "v")
        yield name, entering if shares else torch.randn(tokens, columns), torch.randn(tokens, rows)


def _refit(linear: str, shapes: Shapes) -> Tensor:
    """Fit what is left of a cut linear to targets, from the activations of all windows."""
    rows, columns = shapes.linears[linear]
    inner = rank_for_keep_ratio(_KEPT, rows, columns)
    if linear == "down":
        inner = round(_KEPT * columns)
    sums: dict[str, Tensor] = {}
    tokens = shapes.tokens // _WINDOWS
    for _ in range(_WINDOWS):
        z, target = torch.randn(tokens, inner), torch.randn(tokens, rows)
        add_products(sums, linear, z, target, torch.ones(tokens))
    prior = torch.randn(rows, inner) / inner**0.5
    cross, gram = sums[f"{linear}:cross"], sums[f"{linear}:gram"]
    return pulled_regression(cross, gram, prior, pull=1.0, ridge=RIDGE)


def operations(step: Step, shapes: Shapes) -> tuple[float, float]:
    """Return the floating point operations of products and solves, and of singular values.

    Args:
        step: What is counted.
        shapes: Sizes of the layer.

    Returns:
        Both numbers, for one call.
    """
    if not step.linear:
        sizes = [shapes.hidden, *(rows for rows, _ in shapes.linears.values())]
        sizes += [columns for name, (_, columns) in shapes.linears.items() if name in "o down"]
        return 2.0 * shapes.tokens * sum(size**2 for size in sizes), 0.0
    n, m = (float(size) for size in shapes.linears[step.linear])
    roots, products, least = (n**3 + m**3) / 3, 2 * n * m * (n + m), min(n, m)
    inner = _KEPT * m if step.linear == "down" else _KEPT * n * m / (n + m)
    gone, pool = m - _KEPT * m, _POOL * m
    found = {
        "Cholesky": (m**3 / 3, 0.0),
        "singular values": (roots + products, 8 / 3 * least**2 * max(n, m)),
        "SVD": (roots + products + least**2 * (n + m), 22 * least**2 * max(n, m)),
        "refit": (2 * shapes.tokens * inner * (n + inner) + inner**3 / 3 + 4 * n * inner**2, 0.0),
        "narrowing": ((m**3 + inner**3) / 3 + 2 * inner * gone * (inner + n), 0.0),
        "channel removal": (5 / 3 * m**3 + 2 * n**2 * m + n * m**2 + m * pool**2 * 6, 0.0),
    }
    return found[step.name]


def _line(record: Record) -> str:
    step = record["step"]
    name = f"{step['name']} {step['linear']}".strip()
    return f"{name}: {record['seconds']:.1f} s, {record['peak_bytes'] / 1e9:.2f} GB"


def report(records: Sequence[Record]) -> str:
    """Return the table, as Markdown.

    Args:
        records: Steps with their seconds.

    Returns:
        The text.
    """
    header = ["step", "linear", "calls per layer", "seconds", "peak GB"]
    header += ["32 layers, one thread, h", "16 cores, h", "GPU, min"]
    rows, totals = [], [0.0, 0.0, 0.0]
    for record in records:
        step, shapes = Step(**record["step"]), Shapes(**record["shapes"])
        products, values = operations(step, shapes)
        on_gpu = products / _GPU_PRODUCTS + values / _GPU_VALUES
        calls = _LAYERS * step.times
        hours = record["seconds"] / 3600
        times = [calls * hours, calls * hours / _SPEEDUP, calls * on_gpu / 60]
        totals = [total + time for total, time in zip(totals, times, strict=True)]
        counted = [f"{time:.2f}" for time in times] if calls else ["", "", ""]
        rows.append(
            [
                step.name,
                step.linear or "all",
                str(step.times) if calls else "in others",
                f"{record['seconds']:.1f}",
                f"{record['peak_bytes'] / 1e9:.1f}",
                *counted,
            ]
        )
    rows.append(["all", "", "", "", "", *(f"{total:.2f}" for total in totals)])
    return "\n".join([markdown_table(header, rows), "", hardware()])


if __name__ == "__main__":
    sys.exit(exit_code(main))
