"""A small grid: one model, three methods, one failed cell."""

from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.task_results import TaskResult
from grasp_lightning.evaluation.throughput import Spread
from grasp_lightning.reporting.comparison.results import CellResult, Comparison

DENSE_ANSWERS = {"piqa": (1.0, 1.0, 1.0, 0.0), "arc_easy": (1.0, 0.0, 1.0, 0.0)}
DROP_ANSWERS = {"piqa": (1.0, 0.0, 1.0, 0.0), "arc_easy": (0.0, 0.0, 1.0, 0.0)}


def task(answers: tuple[float, ...]) -> TaskResult:
    mean = sum(answers) / len(answers)
    return TaskResult(
        metrics={"acc": Estimate(mean, 0.25)},
        num_samples=len(answers),
        num_fewshot=0,
        version="1.0",
        samples={"acc": list(answers)},
        documents="same",
    )


def cell(method: str, removed_ratio: float | None, **changes: object) -> CellResult:
    values: dict[str, object] = {
        "model": "tiny",
        "method": method,
        "removed_ratio": removed_ratio,
        "seed": 0,
        "compensation": None,
        "folder": f"cells/tiny-{method}-{removed_ratio}-0",
    }
    return CellResult(**{**values, **changes})  # type: ignore[arg-type]  # keys of CellResult


def spread(median: float) -> Spread:
    return Spread(first_quartile=median - 0.1, median=median, third_quartile=median + 0.1)


DENSE_CELL = cell(
    "dense",
    None,
    removed=0.0,
    perplexity={"WikiText-2": 20.0, "C4": 30.0},
    tasks={name: task(answers) for name, answers in DENSE_ANSWERS.items()},
    bytes=500_000_000,
)
DROP_CELL = cell(
    "drop",
    0.2,
    removed=0.2105,
    perplexity={"WikiText-2": 30.0, "C4": 60.0},
    tasks={name: task(answers) for name, answers in DROP_ANSWERS.items()},
    bytes=400_000_000,
    prefill=spread(1.25),
    decode=spread(1.2),
    seconds=75.0,
    peak_memory_bytes=1_500_000_000,
    paper={"WikiText-2": 28.0, "mean": 0.4},
)
FAILED_CELL = cell("sleb", 0.2, error="MethodError: tiny has no <layers>")
COMPARISON = Comparison(
    cells=(DENSE_CELL, DROP_CELL, FAILED_CELL), machine="2 cores of a test", seconds=3700.0
)
