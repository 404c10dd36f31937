"""Measures methods at several shares of removed parameters, on two texts, as one table.

Each cell is a run folder as ``compress`` writes it, and a file with the perplexity on the second
text. What is finished is read, not measured again, so that a killed run goes on when the same
command is run again.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    StatisticsConfig,
    TrainerConfig,
)
from grasp_lightning.errors import ConfigError

METHODS = {
    "drop": MethodConfig(name="drop"),
    "grasp": MethodConfig(name="grasp", keep_ratio=0.1),
    "svd_llm": MethodConfig(name="low_rank", preset="svd_llm"),
    "grasp_plus": MethodConfig(name="grasp_plus"),
}
_WIKITEXT = "wikitext2_raw/{part}.txt"
_C4 = "c4/realnewslike_validation_sample.jsonl"
_C4_CALIBRATION, _C4_TEST = "0-259", "260-519"
_WORK = ("similarity", "attribution", "curvature", "factorize", "refit")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one size, calibrated on one draw of windows.

    Attributes:
        method: A key of ``METHODS``.
        removed_ratio: Share of all parameters that goes; of deleted layers the nearest.
        seed: Seed of the calibration windows.
    """

    method: str
    removed_ratio: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.method}-{self.removed_ratio:g}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one cell.

    Attributes:
        cell: Which one.
        metrics: Content of its metrics.json.
        c4: Perplexity on C4.
    """

    cell: Cell
    metrics: dict[str, Any]  # Any: values of JSON
    c4: float


def main() -> None:
    """Make the cells that are missing, then print the table."""
    arguments = _parser().parse_args()
    data = _data_folder(arguments.data)
    model = str(loadable_folder(arguments.model, arguments.cache))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    dense_c4 = _c4(model, arguments.runs / "dense.c4.json", data, arguments)
    results: list[Result] = []
    for cell in _cells(arguments):
        config = _config(cell, arguments, model, data)
        metrics = run_fresh(_compress, config)
        folder = f"{config.output_dir}/model"
        c4 = _c4(folder, arguments.runs / f"{cell.name}.c4.json", data, arguments)
        results.append(Result(cell=cell, metrics=metrics, c4=c4))
        _write(Path(arguments.output), results, dense_c4)
        wiki = metrics["perplexity"]["compressed"]
        print(f"{cell.name}: WikiText-2 {wiki:.1f}, C4 {c4:.1f}", flush=True)
    print("\n" + report(results, dense_c4))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument(
        "--data",
        default=os.environ.get("GRASP_DATA"),
        help="folder that holds wikitext2_raw/ and c4/; default: $GRASP_DATA",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sources", choices=("both", "wikitext2", "c4"), default="both")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--test_windows", type=int, default=64, help="from the start of each text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window, all texts")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--output", required=True, help="JSON file with all that was measured")
    parser.add_argument("--runs", type=Path, default=DEFAULT_CACHE / "methods")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    return parser


def _data_folder(data: str | None) -> Path:
    if not data or data == "none":
        raise ConfigError("--data is not set: it names the folder with wikitext2_raw/ and c4/")
    for name in (_WIKITEXT.format(part="validation"), _WIKITEXT.format(part="test"), _C4):
        if not (Path(data) / name).is_file():
            raise ConfigError(f"--data: there is no {Path(data) / name}")
    return Path(data)


def _cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    for ratio in arguments.ratios:
        for method in arguments.methods:
            for seed in arguments.seeds:
                yield Cell(method=method, removed_ratio=ratio, seed=seed)


def _config(cell: Cell, arguments: argparse.Namespace, model: str, data: Path) -> CompressConfig:
    method = MethodConfig(**{**asdict(METHODS[cell.method]), "removed_ratio": cell.removed_ratio})
    return CompressConfig(
        output_dir=str(arguments.runs / cell.name),
        seed=cell.seed,
        model=ModelConfig(path=model, dtype="float32", device="cpu"),
        method=method,
        calibration=_calibration(arguments, data),
        evaluation=EvaluationConfig(
            source="file",
            path=str(data / _WIKITEXT.format(part="test")),
            num_samples=arguments.test_windows,
            seqlen=arguments.seqlen,
            batch_size=arguments.batch_size,
        ),
        trainer=TrainerConfig(accelerator="cpu"),
        statistics=StatisticsConfig(store=False),
    )


def _calibration(arguments: argparse.Namespace, data: Path) -> CalibrationConfig:
    wikitext, c4 = str(data / _WIKITEXT.format(part="validation")), str(data / _C4)
    files = {
        "both": ((wikitext, "0-"), (c4, _C4_CALIBRATION)),
        "wikitext2": ((wikitext, "0-"),),
        "c4": ((c4, _C4_CALIBRATION),),
    }[arguments.sources]
    return CalibrationConfig(
        source=tuple("file" for _ in files),
        path=tuple(path for path, _ in files),
        rows=tuple(rows for _, rows in files),
        num_samples=arguments.windows,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
    )


def _c4(model: str, file: Path, data: Path, arguments: argparse.Namespace) -> float:
    """Return the perplexity of a model on C4, from its file if it was measured before."""
    settings = {"windows": arguments.test_windows, "seqlen": arguments.seqlen}
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["settings"] == settings:
            return float(stored["perplexity"])
    config = EvaluationConfig(
        source="file",
        path=str(data / _C4),
        rows=_C4_TEST,
        num_samples=arguments.test_windows,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
    )
    value = run_fresh(_perplexity, model, config)
    file.write_text(json.dumps({"settings": settings, "perplexity": value}), encoding="utf-8")
    return value


def _compress(config: CompressConfig) -> dict[str, Any]:  # Any: values of JSON
    # Imported here: only the new process needs it.
    from grasp_lightning.commands.compress import run_compress  # noqa: PLC0415

    return run_compress(config).metrics.to_dict()


def _perplexity(model: str, config: EvaluationConfig) -> float:
    from grasp_lightning.commands.tracked import tracked_perplexity  # noqa: PLC0415
    from grasp_lightning.data.windows import evaluation_windows  # noqa: PLC0415
    from grasp_lightning.models.decoder import DecoderView  # noqa: PLC0415
    from grasp_lightning.models.loading import load_model  # noqa: PLC0415

    loaded = load_model(ModelConfig(path=model, device="cpu"))
    windows = evaluation_windows(config, loaded.tokenizer)
    return tracked_perplexity(DecoderView(loaded.model), windows, config.batch_size, "C4")


def _write(output: Path, results: Sequence[Result], dense_c4: float) -> None:
    cells = [asdict(result) for result in results]
    content = {"hardware": hardware(), "dense_c4": dense_c4, "cells": cells}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(results: Sequence[Result], dense_c4: float) -> str:
    """Return the table and what it was measured on, as Markdown.

    Args:
        results: All cells.
        dense_c4: Perplexity of the dense model on C4.

    Returns:
        The text.
    """
    dense = results[0].metrics["perplexity"]["dense"]
    header = ["method", "seed", "removed", "WikiText-2", "C4", "predicted", "seconds", "peak GB"]
    rows = [["dense", "", "0 %", f"{dense:.2f}", f"{dense_c4:.2f}", "", "", ""]]
    rows += [_row(result, dense, dense_c4) for result in results]
    return "\n".join([markdown_table(header, rows), "", hardware()])


def _row(result: Result, dense: float, dense_c4: float) -> list[str]:
    metrics = result.metrics
    wiki, seconds = metrics["perplexity"]["compressed"], metrics["seconds"]
    predicted = metrics["loss_change"]["predicted"]
    return [
        result.cell.method,
        str(result.cell.seed),
        f"{100 * metrics['removed_ratio']:.1f} %",
        f"{wiki:.1f} (x {wiki / dense:.2f})",
        f"{result.c4:.1f} (x {result.c4 / dense_c4:.2f})",
        "" if predicted is None else f"{predicted:.2f}",
        f"{sum(seconds[phase] or 0.0 for phase in _WORK):.0f}",
        f"{metrics['peak_memory_bytes'] / 1e9:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
