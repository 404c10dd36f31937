"""Measures perplexity on WikiText-2 after replacing layers in several ways, as one table.

Each row is a run folder of ``compress``. Finished rows are only read, so a killed run resumes when
the same command is run again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _common import (
    DEFAULT_CACHE,
    exit_code,
    hardware,
    loadable_folder,
    markdown_table,
    run_fresh,
)

from grasp_lightning.config import (
    CalibrationConfig,
    CompressConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    TrainerConfig,
)
from grasp_lightning.errors import ConfigError

Metrics = dict[str, Any]  # content of a metrics.json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to replace layers.

    Attributes:
        name: Name of its run folder.
        label: Its name in the table.
        schedule: When components are scored, for the table.
        method: Options; number of layers and keep ratio are added.
    """

    name: str
    label: str
    schedule: str
    method: MethodConfig


ROWS = (
    Row(name="drop", label="layers deleted", schedule="", method=MethodConfig(name="drop")),
    Row(
        name="paper_one_shot",
        label="preset paper",
        schedule="one_shot",
        method=MethodConfig(name="grasp", preset="paper"),
    ),
    Row(
        name="paper_iterative",
        label="paper's scores",
        schedule="iterative",
        method=MethodConfig(name="grasp", preset="paper", schedule="iterative"),
    ),
    Row(
        name="released_iterative",
        label="preset released",
        schedule="iterative",
        method=MethodConfig(name="grasp", preset="released"),
    ),
    Row(
        name="released_one_shot",
        label="released's scores",
        schedule="one_shot",
        method=MethodConfig(name="grasp", preset="released", schedule="one_shot"),
    ),
    Row(
        name="magnitude",
        label="largest singular values",
        schedule="",
        method=MethodConfig(name="grasp", score="magnitude"),
    ),
)


def main() -> None:
    """Run the missing rows, then print the table."""
    arguments = _parser().parse_args()
    data = _data_files(arguments.data)
    model = loadable_folder(arguments.model, arguments.cache)
    results: list[tuple[Row, Metrics]] = []
    for row in (row for row in ROWS if row.name in arguments.rows):
        config = _config(row, arguments, str(model), data)
        results.append((row, run_fresh(_compress, config)))
        _write(Path(arguments.output), results)
        print(
            f"{row.name}: perplexity {results[-1][1]['perplexity']['compressed']:.1f}", flush=True
        )
    print("\n" + report(results))


def _parser() -> argparse.ArgumentParser:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument(
        "--data",
        default=os.environ.get("GRASP_DATA"),
        help="folder that holds wikitext2_raw/validation.txt and test.txt; default: $GRASP_DATA",
    )
    parser.add_argument("--num_layers", type=int, default=8, help="layers to replace")
    parser.add_argument("--keep_ratio", type=float, default=0.1)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--test_windows", type=int, default=24, help="from the start of test.txt")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window, both texts")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--output", required=True, help="JSON file with the metrics of all rows")
    parser.add_argument("--runs", type=Path, default=DEFAULT_CACHE / "perplexity")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    parser.add_argument("--overwrite", action="store_true", help="run finished rows again")
    return parser


def _data_files(data: str | None) -> tuple[str, str]:
    """Return the calibration and the test text."""
    if not data or data == "none":
        raise ConfigError("--data is not set; set it to the folder that contains wikitext2_raw/")
    files = [Path(data) / "wikitext2_raw" / f"{part}.txt" for part in ("validation", "test")]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"--data: {file} does not exist")
    return str(files[0]), str(files[1])


def _config(
    row: Row, arguments: argparse.Namespace, model: str, data: tuple[str, str]
) -> CompressConfig:
    is_low_rank = row.method.name != "drop"
    method = replace(
        row.method,
        num_layers=arguments.num_layers,
        keep_ratio=arguments.keep_ratio if is_low_rank else None,
    )
    seqlen, batch_size = arguments.seqlen, arguments.batch_size
    return CompressConfig(
        output_dir=str(arguments.runs / row.name),
        overwrite=arguments.overwrite,
        seed=arguments.seed,
        model=ModelConfig(path=model, dtype="float32", device="cpu"),
        method=method,
        calibration=CalibrationConfig(
            source="file",
            path=data[0],
            num_samples=arguments.windows,
            seqlen=seqlen,
            batch_size=batch_size,
        ),
        evaluation=EvaluationConfig(
            source="file",
            path=data[1],
            num_samples=arguments.test_windows,
            seqlen=seqlen,
            batch_size=batch_size,
        ),
        trainer=TrainerConfig(accelerator="cpu"),
    )


def _compress(config: CompressConfig) -> Metrics:
    # Imported here: only the new process needs it.
    from grasp_lightning.commands.compress import run_compress  # noqa: PLC0415

    return run_compress(config).metrics.to_dict()


def _write(output: Path, results: Sequence[tuple[Row, Metrics]]) -> None:
    rows = [
        {"row": row.name, "method": asdict(row.method), "metrics": metrics}
        for row, metrics in results
    ]
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
    header = ["layers replaced by", "schedule", "perplexity", "removed", "seconds"]
    rows = [["nothing (dense)", "", f"{first['perplexity']['dense']:.1f}", "0 %", ""]]
    rows += [_cells(row, metrics) for row, metrics in results]
    return "\n".join([markdown_table(header, rows), "", *_conditions(results), hardware()])


def _cells(row: Row, metrics: Metrics) -> list[str]:
    return [
        row.label,
        row.schedule,
        f"{metrics['perplexity']['compressed']:.1f}",
        f"{100 * metrics['removed_ratio']:.1f} %",
        f"{_work_seconds(metrics['seconds']):.0f}",
    ]


def _work_seconds(seconds: Mapping[str, float | None]) -> float:
    """Return the time of the compression alone, without loading, saving and evaluating."""
    return sum(seconds[phase] or 0.0 for phase in ("similarity", "attribution", "factorize"))


def _conditions(results: Sequence[tuple[Row, Metrics]]) -> Iterator[str]:
    for layers in sorted({tuple(metrics["layers"]) for _, metrics in results}):
        yield f"Layers {', '.join(map(str, layers))}."
    metrics = results[0][1]
    yield f"Perplexity over {metrics['perplexity_tokens']} predicted tokens."


if __name__ == "__main__":
    sys.exit(exit_code(main))
