"""Compares ways to train a compressed model: the same steps, the same samples, one table.

Each row is a run folder of ``compensate``. Finished rows are only read, and a row that was killed
resumes after its last saved step.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import DEFAULT_CACHE, exit_code, hardware, loadable_folder, markdown_table, run_fresh

from grasp_lightning.config import (
    CompensateConfig,
    DistillationConfig,
    EvaluationConfig,
    InstructionConfig,
    LoraSettings,
    ModelConfig,
    Objective,
    OptimizerConfig,
    TrainerConfig,
    TrainingConfig,
    TrainMode,
)
from grasp_lightning.errors import ConfigError

Metrics = dict[str, Any]  # content of a metrics.json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train.

    Attributes:
        name: Name of its run folder, and in the table.
        train: What is trained.
        objective: What is learned.
    """

    name: str
    train: TrainMode
    objective: Objective


ROWS = (
    Row(name="lora", train="lora", objective="instruction"),
    Row(name="factors", train="factors", objective="instruction"),
    Row(name="lora_on_factors", train="lora_on_factors", objective="instruction"),
    Row(name="distill", train="lora", objective="distill"),
)


def main() -> None:
    """Run the missing rows, then print the table."""
    arguments = _parser().parse_args()
    samples, text = _data_files(arguments.data)
    teacher = str(loadable_folder(arguments.teacher, arguments.cache))
    results: list[tuple[Row, Metrics]] = []
    for row in (row for row in ROWS if row.name in arguments.rows):
        config = _config(row, arguments, teacher, samples, text)
        metrics = run_fresh(_compensate, config)
        metrics["tokens_per_second"] = _speed(arguments.runs / row.name)
        results.append((row, metrics))
        _write(Path(arguments.output), results)
        print(f"{row.name}: perplexity {results[-1][1]['perplexity']['after']:.1f}", flush=True)
    print("\n" + report(results))


def _parser() -> argparse.ArgumentParser:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/quickstart/model", help="the compressed model")
    parser.add_argument("--teacher", default="smollm2", help="the dense model, for distill")
    parser.add_argument(
        "--data",
        default=os.environ.get("GRASP_DATA"),
        help="folder with alpaca/train.jsonl and wikitext2_raw/test.txt; default: $GRASP_DATA",
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--validation", type=int, default=200, help="samples set aside")
    parser.add_argument("--test_windows", type=int, default=64, help="from the start of test.txt")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per test window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--output", required=True, help="JSON file with the metrics of all rows")
    parser.add_argument("--runs", type=Path, default=DEFAULT_CACHE / "compensation")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    parser.add_argument("--overwrite", action="store_true", help="run finished rows again")
    return parser


def _data_files(data: str | None) -> tuple[str, str]:
    """Return the samples to train on, and the test text."""
    if not data or data == "none":
        raise ConfigError("--data is not set; set it to the folder that contains alpaca/")
    files = [Path(data) / "alpaca" / "train.jsonl", Path(data) / "wikitext2_raw" / "test.txt"]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"--data: {file} does not exist")
    return str(files[0]), str(files[1])


def _config(
    row: Row, arguments: argparse.Namespace, teacher: str, samples: str, text: str
) -> CompensateConfig:
    has_adapters, has_teacher = row.train != "factors", row.objective == "distill"
    return CompensateConfig(
        output_dir=str(arguments.runs / row.name),
        overwrite=arguments.overwrite,
        seed=arguments.seed,
        train=row.train,
        objective=row.objective,
        model=ModelConfig(path=arguments.model, dtype="float32", device="cpu"),
        lora=LoraSettings(rank=arguments.rank) if has_adapters else LoraSettings(),
        data=InstructionConfig(
            source="file",
            path=samples,
            num_validation=arguments.validation,
            order="length_grouped",
        ),
        distillation=DistillationConfig(teacher=teacher, mix=0.5)
        if has_teacher
        else DistillationConfig(),
        optimizer=OptimizerConfig(
            learning_rate=arguments.learning_rate, warmup_steps=arguments.steps // 10
        ),
        training=TrainingConfig(
            batch_size=arguments.batch_size,
            micro_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
        ),
        evaluation=EvaluationConfig(
            source="file",
            path=text,
            num_samples=arguments.test_windows,
            seqlen=arguments.seqlen,
            batch_size=2,
        ),
        trainer=TrainerConfig(accelerator="cpu"),
    )


def _compensate(config: CompensateConfig) -> Metrics:
    # Imported here: only the new process needs it.
    from grasp_lightning.commands.compensate import run_compensate  # noqa: PLC0415

    return run_compensate(config).metrics.to_dict()


def _speed(run: Path) -> float:
    """Return predicted tokens per second of the median step, which other load affects least."""
    speeds = []
    for file in run.glob("logs/start_*/metrics.csv"):
        with file.open(encoding="utf-8") as lines:
            speeds += [row["tokens_per_second"] for row in csv.DictReader(lines)]
    return statistics.median(float(speed) for speed in speeds if speed)


def _write(output: Path, results: Sequence[tuple[Row, Metrics]]) -> None:
    rows = [{"row": row.name, "metrics": metrics} for row, metrics in results]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=2) + "\n")


def report(results: Sequence[tuple[Row, Metrics]]) -> str:
    """Return the table and what it was measured on, as Markdown.

    Args:
        results: Rows with their metrics.

    Returns:
        The text.
    """
    first = results[0][1]
    header = [
        "trained",
        "trainable",
        "WikiText-2 perplexity",
        "Alpaca validation loss",
        "seconds",
        "tokens/s",
        "gain per 1000 s",
        "peak GB",
    ]
    start = (f"{first['perplexity']['before']:.1f}", f"{first['validation_loss']['before']:.3f}")
    rows = [["nothing (compressed)", "", *start, "", "", "", ""]]
    rows += [_cells(row, metrics) for row, metrics in results]
    tokens = f"{first['perplexity_tokens']:,} and {first['validation_tokens']:,} predicted tokens."
    return "\n".join([markdown_table(header, rows), "", tokens, hardware()])


def _cells(row: Row, metrics: Metrics) -> list[str]:
    perplexity, speed = metrics["perplexity"], metrics["tokens_per_second"]
    gain = math.log(perplexity["before"] / perplexity["after"])
    undisturbed = metrics["trained_tokens"] / speed  # seconds
    return [
        row.name,
        f"{metrics['parameters']['trainable']:,}",
        f"{perplexity['after']:.1f}",
        f"{metrics['validation_loss']['after']:.3f}",
        f"{metrics['seconds']['train']:.0f}",
        f"{speed:.0f}",
        f"{1000 * gain / undisturbed:.2f}",
        f"{metrics['peak_memory_bytes'] / 1e9:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
