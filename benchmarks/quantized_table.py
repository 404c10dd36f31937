"""Measures a dense and a compressed model with quantized weights, as one table.

Each row is a folder, written by ``quantize`` once, so a killed run resumes when the same command is
run again. Perplexity is on the first windows of a text; decoding is measured alternately.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import DEFAULT_CACHE, exit_code, hardware, loadable_folder, markdown_table, run_fresh

from grasp_lightning.config import ModelConfig

KINDS = ("float32", "int8", "int4", "nf4")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model with one type of weights.

    Attributes:
        perplexity: On the held-out windows.
        disk_bytes: Size of the weight files.
        memory_bytes: Size of all parameters and scales.
        decode: Tokens per second of one sequence: first quartile, median, third quartile.
    """

    perplexity: float
    disk_bytes: int
    memory_bytes: int
    decode: tuple[float, float, float]


def main() -> None:
    """Write the missing folders, measure all, and print the table."""
    arguments = _parser().parse_args()
    sources = {
        "dense": loadable_folder(arguments.model, arguments.cache),
        "compressed": arguments.compressed,
    }
    folders: dict[str, Path] = {}
    for name, source in sources.items():
        for kind in KINDS:
            folder = arguments.cache / "quantized" / f"{name}-{kind}"
            if kind != "float32" and not folder.is_dir():
                run_fresh(_quantize, source, folder, kind)
            folders[f"{name}, {kind}"] = source if kind == "float32" else folder
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    stored = arguments.output.with_suffix(".perplexity.json")
    rows = run_fresh(_measure, folders, arguments.text, arguments.windows, arguments.rounds, stored)
    content = {"hardware": hardware(), "rows": {name: vars(row) for name, row in rows.items()}}
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print("\n" + report(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="the dense model")
    parser.add_argument("--compressed", type=Path, default=Path("runs/quickstart/model"))
    parser.add_argument("--text", required=True, help="file of text for perplexity")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--rounds", type=int, default=7, help="of the measurement of speed")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--output", type=Path, default=DEFAULT_CACHE / "quantized.json")
    return parser


def _quantize(source: Path, folder: Path, kind: str) -> None:
    from grasp_lightning import quantize  # noqa: PLC0415
    from grasp_lightning.models.loading import load_model  # noqa: PLC0415

    loaded = load_model(ModelConfig(path=str(source), device="cpu"))
    quantize(loaded.model, kind)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _measure(
    folders: Mapping[str, Path], text: str, windows: int, rounds: int, stored: Path
) -> dict[str, Row]:
    # Imported here: only the new process needs them.
    import torch  # noqa: PLC0415

    from grasp_lightning import evaluate  # noqa: PLC0415
    from grasp_lightning.evaluation.throughput import measure_throughput  # noqa: PLC0415
    from grasp_lightning.evaluation.workload import Workload  # noqa: PLC0415
    from grasp_lightning.models.loading import load_model  # noqa: PLC0415
    from grasp_lightning.models.size import count_bytes  # noqa: PLC0415

    torch.set_num_threads(1)
    options = {"num_samples": windows, "seqlen": 512, "batch_size": 1}
    measured: list[dict[str, Any]] = evaluate(
        *folders.values(), corpora=text, evaluation=options, output=stored
    )
    models = {
        name: load_model(ModelConfig(path=str(folder), device="cpu")).model
        for name, folder in folders.items()
    }
    workload = Workload(
        prefill_lengths=(),
        decode_batch_sizes=(1,),
        prompt_length=16,
        new_tokens=32,
        num_rounds=rounds,
        seed=0,
        vocabulary=next(iter(models.values())).config.vocab_size,
    )
    timings = measure_throughput(models, workload, lambda turns, _: turns)
    rows = {}
    for (name, model), result in zip(models.items(), measured, strict=True):
        speed = timings[name][0].tokens_per_second
        rows[name] = Row(
            perplexity=next(iter(result["corpora"].values()))["perplexity"],
            disk_bytes=sum(file.stat().st_size for file in folders[name].glob("*.safetensors")),
            memory_bytes=count_bytes(model),
            decode=(speed.first_quartile, speed.median, speed.third_quartile),
        )
    return rows


def report(rows: Mapping[str, Row]) -> str:
    """Return the table in Markdown.

    Args:
        rows: Measurements by name.

    Returns:
        The table.
    """
    header = ("model", "MB on disk", "MB in memory", "perplexity", "decode, tokens/s")
    cells = [
        (
            name,
            f"{row.disk_bytes / 1e6:.1f}",
            f"{row.memory_bytes / 1e6:.1f}",
            f"{row.perplexity:.2f}",
            f"{row.decode[1]:.1f} ({row.decode[0]:.1f} to {row.decode[2]:.1f})",
        )
        for name, row in rows.items()
    ]
    return markdown_table(header, cells)


if __name__ == "__main__":
    sys.exit(exit_code(main))
