"""Measures methods at several shares of removed parameters, on two texts, as one table.

Each cell is a run folder of ``compress``, and a file with the perplexities of its model. Finished
cells are only read, so a killed run resumes when the same command is run again.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
_ALPACA = "alpaca/train.jsonl"
_C4_CALIBRATION, _C4_TEST = "0-259", "260-519"
_SOURCES = ("both", "wikitext2", "c4", "instructions", "self", "both_and_self")
_WORK = ("sample", "similarity", "attribution", "curvature", "factorize", "refit")
_DEFAULT_RATIO = 0.2
# The options of a method that its pass depends on.
_MEASURED_KEYS = (
    *("fisher=", "mlp=", "ranks=", "removable="),
    *("weighting=fisher_rows", "weighting=scale_columns"),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one size, calibrated on one draw of windows.

    Attributes:
        method: A key of ``METHODS``, and after a colon any changed keys of the method, such as
            ``grasp_plus:refit=none,mlp=factors``.
        removed_ratio: Share of all parameters to remove; for deleted layers, the nearest.
        sources: Calibration text.
        windows: Number of windows.
        seed: Seed of the choice of windows.
    """

    method: str
    removed_ratio: float
    sources: str
    windows: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        parts = (self.method, f"{self.removed_ratio:g}", self.sources, self.windows, self.seed)
        return re.sub(r"[^\w.=-]+", "-", "-".join(str(part) for part in parts))

    @property
    def config(self) -> MethodConfig:
        """What the method does."""
        name, _, changes = self.method.partition(":")
        config = replace(METHODS[name], removed_ratio=self.removed_ratio)
        for change in changes.split(",") if changes else ():
            key, _, value = change.partition("=")
            config = replace(config, **{key: _number_or_word(value)})
        return config

    @property
    def measured(self) -> "Cell":
        """The cell whose statistics this one uses; itself, if it measures its own."""
        name, _, changes = self.method.partition(":")
        if name != "grasp_plus":
            return self
        kept = [change for change in changes.split(",") if change.startswith(_MEASURED_KEYS)]
        method = ":".join([name, ",".join(kept)] if kept else [name])
        return replace(self, method=method, removed_ratio=_DEFAULT_RATIO)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of one cell.

    Attributes:
        cell: Which one.
        metrics: Content of its metrics.json.
        seconds: Time of measuring and replacing, including a pass made by another cell.
        perplexity: By text.
    """

    cell: Cell
    metrics: dict[str, Any]  # Any: values of JSON
    seconds: float
    perplexity: dict[str, float]


def main() -> None:
    """Run the missing cells, then print the table."""
    arguments = _parser().parse_args()
    data = _data_folder(arguments.data)
    model = str(loadable_folder(arguments.model, arguments.cache))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    file = arguments.runs / "dense.json"
    dense = run_fresh(_perplexities, model, file, _texts(arguments, data))
    results: list[Result] = []
    for cell in _cells(arguments):
        result = _result(cell, model, data, arguments)
        results.append(result)
        _write(Path(arguments.output), results, dense)
        texts = ", ".join(f"{text} {value:.1f}" for text, value in result.perplexity.items())
        print(f"{cell.name}: {texts}", flush=True)
    print("\n" + report(results, dense))


def _result(cell: Cell, model: str, data: Path, arguments: argparse.Namespace) -> Result:
    config, seconds = _config(cell, arguments, model, data), 0.0
    if cell.measured != cell:
        measured = _result(cell.measured, model, data, arguments)
        seconds = measured.metrics["seconds"]["curvature"]
        config = replace(config, from_scores=str(arguments.runs / cell.measured.name))
    file = arguments.runs / f"{cell.name}.json"
    metrics, perplexity = run_fresh(_compressed, config, file, _texts(arguments, data))
    return Result(
        cell=cell,
        metrics=metrics,
        seconds=seconds + sum(metrics["seconds"][phase] or 0.0 for phase in _WORK),
        perplexity=perplexity,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument(
        "--data",
        default=os.environ.get("GRASP_DATA"),
        help="folder that holds wikitext2_raw/, c4/ and, for instructions, alpaca/; default: "
        "$GRASP_DATA",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=_method,
        default=list(METHODS),
        help=f"{', '.join(METHODS)}; other parts after a colon: grasp_plus:refit=none,mlp=factors",
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, _DEFAULT_RATIO, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sources", nargs="+", choices=_SOURCES, default=["both"])
    parser.add_argument("--windows", nargs="+", type=int, default=[64], help="of calibration text")
    parser.add_argument("--test_windows", type=int, default=64, help="from the start of each text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens per window, all texts")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--output", required=True, help="JSON file with all measurements")
    parser.add_argument("--runs", type=Path, default=DEFAULT_CACHE / "methods")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    return parser


def _method(text: str) -> str:
    name, _, changes = text.partition(":")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    known = {field.name for field in fields(MethodConfig)} - {"name", "removed_ratio"}
    for change in changes.split(",") if changes else ():
        key, _, value = change.partition("=")
        if key not in known or not value:
            raise argparse.ArgumentTypeError(f"{change!r} is not a KEY=VALUE of a method")
    return text


def _number_or_word(text: str) -> Any:  # noqa: ANN401  the type that its key has
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _data_folder(data: str | None) -> Path:
    if not data or data == "none":
        raise ConfigError(
            "--data is not set; set it to the folder that contains wikitext2_raw/ and c4/"
        )
    for name in (_WIKITEXT.format(part="validation"), _WIKITEXT.format(part="test"), _C4):
        if not (Path(data) / name).is_file():
            raise ConfigError(f"--data: there is no {Path(data) / name}")
    return Path(data)


def _cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    for sources in arguments.sources:
        for windows in arguments.windows:
            for ratio in arguments.ratios:
                for method in arguments.methods:
                    for seed in arguments.seeds:
                        yield Cell(
                            method=method,
                            removed_ratio=ratio,
                            sources=sources,
                            windows=windows,
                            seed=seed,
                        )


def _config(cell: Cell, arguments: argparse.Namespace, model: str, data: Path) -> CompressConfig:
    return CompressConfig(
        output_dir=str(arguments.runs / cell.name),
        seed=cell.seed,
        model=ModelConfig(path=model, dtype="float32", device="cpu"),
        method=cell.config,
        calibration=_calibration(cell, arguments, data),
        # Both texts are measured afterwards, once per model.
        evaluation=replace(_texts(arguments, data)["WikiText-2"], num_samples=1),
        trainer=TrainerConfig(accelerator="cpu"),
        statistics=StatisticsConfig(
            store=cell.config.name == "grasp_plus" and cell.method == cell.measured.method,
            measured_windows=0,
        ),
    )


def _calibration(cell: Cell, arguments: argparse.Namespace, data: Path) -> CalibrationConfig:
    wikitext = ("file", str(data / _WIKITEXT.format(part="validation")), "0-")
    c4 = ("file", str(data / _C4), _C4_CALIBRATION)
    own = ("self", None, None)
    sources = {
        "both": (wikitext, c4),
        "wikitext2": (wikitext,),
        "c4": (c4,),
        "instructions": (("instructions", str(data / _ALPACA), "0-"),),
        "self": (own,),
        "both_and_self": (wikitext, c4, own),
    }[cell.sources]
    paths = tuple(path for _, path, _ in sources if path is not None)
    return CalibrationConfig(
        source=tuple(source for source, _, _ in sources),
        path=paths or None,
        rows=tuple(rows for _, _, rows in sources if rows is not None) or None,
        num_samples=cell.windows,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
    )


def _texts(arguments: argparse.Namespace, data: Path) -> dict[str, EvaluationConfig]:
    wikitext = EvaluationConfig(
        source="file",
        path=str(data / _WIKITEXT.format(part="test")),
        num_samples=arguments.test_windows,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
    )
    return {"WikiText-2": wikitext, "C4": replace(wikitext, path=str(data / _C4), rows=_C4_TEST)}


def _compressed(
    config: CompressConfig, file: Path, texts: dict[str, EvaluationConfig]
) -> tuple[dict[str, Any], dict[str, float]]:  # Any: values of JSON
    """Return what a finished run measured, and the perplexities of its model."""
    # Imported here: only the new process needs it.
    from grasp_lightning.commands.compress import run_compress  # noqa: PLC0415

    metrics = run_compress(config).metrics.to_dict()
    return metrics, _perplexities(f"{config.output_dir}/model", file, texts)


def _perplexities(model: str, file: Path, texts: dict[str, EvaluationConfig]) -> dict[str, float]:
    """Return the perplexity of a model by text, from its file if it was measured before."""
    settings = {name: [text.num_samples, text.seqlen] for name, text in texts.items()}
    if file.is_file():
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if stored["windows"] == settings:
            return dict(stored["perplexity"])
    values = _measured_perplexities(model, texts)
    file.write_text(json.dumps({"windows": settings, "perplexity": values}), encoding="utf-8")
    return values


def _measured_perplexities(model: str, texts: dict[str, EvaluationConfig]) -> dict[str, float]:
    from grasp_lightning.commands.workflow import tracked_perplexity  # noqa: PLC0415
    from grasp_lightning.data.section_windows import evaluation_windows  # noqa: PLC0415
    from grasp_lightning.models.decoder import DecoderView  # noqa: PLC0415
    from grasp_lightning.models.loading import load_model  # noqa: PLC0415

    loaded = load_model(ModelConfig(path=model, device="cpu"))
    view, values = DecoderView(loaded.model), {}
    for name, config in texts.items():
        windows = evaluation_windows(config, loaded.tokenizer)
        values[name] = tracked_perplexity(view, windows, config.batch_size, name)
    return values


def _write(output: Path, results: Sequence[Result], dense: dict[str, float]) -> None:
    cells = [asdict(result) for result in results]
    content = {"hardware": hardware(), "dense": dense, "cells": cells}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(results: Sequence[Result], dense: dict[str, float]) -> str:
    """Return the table and what it was measured on, as Markdown.

    Args:
        results: All cells.
        dense: Perplexity of the dense model by text.

    Returns:
        The text.
    """
    header = ["method", "calibrated on", "seed", "removed", *dense]
    header += ["predicted", "measured", "seconds", "peak GB"]
    texts = [f"{value:.2f}" for value in dense.values()]
    rows = [["dense", "", "", "0 %", *texts, "", "", "", ""]]
    rows += [_row(result, dense) for result in results]
    return "\n".join([markdown_table(header, rows), "", hardware()])


def _row(result: Result, dense: dict[str, float]) -> list[str]:
    metrics, cell = result.metrics, result.cell
    growth = {text: value / dense[text] for text, value in result.perplexity.items()}
    predicted = metrics["loss_change"]["predicted"]
    return [
        cell.method,
        f"{cell.sources}, {cell.windows}",
        str(cell.seed),
        f"{100 * metrics['removed_ratio']:.1f} %",
        *(f"{value:.1f} (x {growth[text]:.2f})" for text, value in result.perplexity.items()),
        "" if predicted is None else f"{predicted:.2f}",
        f"{math.log(growth['WikiText-2']):.2f}",
        f"{result.seconds:.0f}",
        f"{metrics['peak_memory_bytes'] / 1e9:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
