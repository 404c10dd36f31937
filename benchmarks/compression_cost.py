"""Measures what compression costs against the released procedure and against a lower bound.

Rounds of all variants in random order, each measurement in a fresh process. Every measurement is
appended to the output at once, so a killed run resumes when the same command is run again.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _common import (
    DEFAULT_CACHE,
    exit_code,
    hardware,
    loadable_folder,
    markdown_table,
    run_fresh,
    whole_lines,
)
from _cost_variants import CostSettings, choose_layers, measure

from grasp_lightning.errors import ConfigError, OutputError

# The layers that similarity chooses in the quickstart: 8 of SmolLM2's 30 layers.
QUICKSTART_LAYERS = (3, 12, 13, 14, 15, 17, 25, 26)
LABELS: Mapping[str, str] = {
    "reference_frozen": "reference, only s trainable",
    "reference_factors": "reference, u, s, v of the block trainable",
    "reference_all": "reference, gradients everywhere",
    "one_shot": "one_shot (preset paper)",
    "one_shot_choosing": "one_shot, with the choice of layers",
    "iterative": "iterative (preset released)",
    "floor": "floor: SVDs, one forward, one backward",
}
_PAIRS = (  # pairs whose ratio is reported: slower, faster
    ("reference_frozen", "one_shot"),
    ("reference_factors", "one_shot"),
    ("reference_all", "one_shot"),
    ("reference_frozen", "iterative"),
    ("reference_factors", "iterative"),
    ("one_shot", "floor"),
    ("one_shot_choosing", "floor"),
)

Record = dict[str, Any]  # one measurement, as in the output: values of JSON


def main() -> None:
    """Make the measurements that the output lacks, then print the table."""
    arguments = _parser().parse_args()
    settings = _settings(arguments)
    output = Path(arguments.output)
    records = _stored(output, settings)
    for round_index, variant in _schedule(arguments.rounds, arguments.variants, arguments.seed):
        if any((r["round"], r["variant"]) == (round_index, variant) for r in records):
            continue
        record = _measure(round_index, variant, settings)
        _append(output, record)
        records.append(record)
        print(
            f"round {round_index + 1} of {arguments.rounds}: {variant}: {record['seconds']:.1f} s",
            flush=True,
        )
    print("\n" + report([r for r in records if r["variant"] in arguments.variants]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument("--data", default="pydoc", help="pydoc, or a text file")
    parser.add_argument("--num_layers", type=int, default=8, help="number of layers to replace")
    parser.add_argument(
        "--layers",
        type=_numbers,
        help="which ones, as in 3,12,13; default: those of the quickstart for smollm2 and 8, "
        "otherwise by similarity",
    )
    parser.add_argument("--keep_ratio", type=float, default=0.1)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window")
    parser.add_argument("--batch_size", type=int, default=1, help="ours; the reference takes 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of windows and order")
    parser.add_argument("--variants", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument(
        "--estimate_blocks",
        type=int,
        help="time the reference on this many blocks and scale up; default: all blocks",
    )
    parser.add_argument("--output", required=True, help="JSON lines, one per measurement")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _settings(arguments: argparse.Namespace) -> CostSettings:
    for key in ("num_layers", "rounds", "estimate_blocks"):
        value = getattr(arguments, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key} must be at least 1, got {value}")
    settings = CostSettings(
        model=str(loadable_folder(arguments.model, arguments.cache)),
        data=arguments.data,
        layers=(),
        keep_ratio=arguments.keep_ratio,
        windows=arguments.windows,
        seqlen=arguments.seqlen,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        estimate_blocks=arguments.estimate_blocks,
    )
    layers: tuple[int, ...] | None = arguments.layers
    if layers is None and (arguments.model, arguments.num_layers) == ("smollm2", 8):
        layers = QUICKSTART_LAYERS
    if layers is None:
        layers = run_fresh(choose_layers, settings, arguments.num_layers)
    return replace(settings, layers=layers)


def _schedule(rounds: int, variants: Sequence[str], seed: int) -> Iterator[tuple[int, str]]:
    """Yield (round, variant); the order within a round does not depend on where a run resumes."""
    for round_index in range(rounds):
        order = sorted(variants)
        random.Random(f"{seed} {round_index}").shuffle(order)
        yield from ((round_index, variant) for variant in order)


def _measure(round_index: int, variant: str, settings: CostSettings) -> Record:
    load_average = os.getloadavg()[0]
    measured = run_fresh(measure, variant, settings)
    return {
        "variant": variant,
        "round": round_index,
        **asdict(measured),
        "load_average": load_average,
        "hardware": hardware(),
        "settings": _plain(settings),
    }


def _plain(settings: CostSettings) -> Record:
    return {**asdict(settings), "layers": list(settings.layers)}


def _append(output: Path, record: Record) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _stored(output: Path, settings: CostSettings) -> list[Record]:
    """Return the measurements of earlier runs."""
    records: list[Record] = [json.loads(line) for line in whole_lines(output)]
    now = _plain(settings)
    for record in records:
        differing = [key for key in now if record["settings"].get(key) != now[key]]
        if differing:
            key = differing[0]
            raise OutputError(
                f"{output} contains measurements with {key} {record['settings'].get(key)}, now it "
                f"is {now[key]}; name another --output"
            )
    return records


def report(records: Sequence[Record]) -> str:
    """Return table, ratios and checks as Markdown.

    Args:
        records: All measurements.

    Returns:
        The text.
    """
    median = {name: _medians(records, name) for name in LABELS if _of(records, name)}
    header = ["variant", "rounds", "seconds", "range", "CPU seconds", "passes", "layer passes"]
    header += ["peak MB", "above the model, MB"]
    rows = [_row(records, name, values) for name, values in median.items()]
    lines = [markdown_table(header, rows), "", *_ratios(median), *_floor_parts(records)]
    lines += [*_agreement(records), "", *_conditions(records)]
    return "\n".join(lines)


def _of(records: Sequence[Record], variant: str) -> list[Record]:
    return [record for record in records if record["variant"] == variant]


def _medians(records: Sequence[Record], variant: str) -> dict[str, float]:
    keys = ("seconds", "cpu_seconds", "passes", "layer_passes", "peak_bytes", "loaded_bytes")
    runs = _of(records, variant)
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def _row(records: Sequence[Record], variant: str, values: Mapping[str, float]) -> list[str]:
    runs = _of(records, variant)
    seconds = [run["seconds"] for run in runs]
    # The peak of some blocks is not the peak of all: the lowest has the longest backward pass.
    is_estimate = any(run["scale"] != 1 for run in runs)
    peak, loaded = values["peak_bytes"] / 1e6, values["loaded_bytes"] / 1e6
    return [
        LABELS[variant] + (", estimated" if is_estimate else ""),
        str(len(runs)),
        f"{values['seconds']:.1f}",
        f"{min(seconds):.1f} to {max(seconds):.1f}",
        f"{values['cpu_seconds']:.1f}",
        f"{values['passes']:.1f}",
        f"{values['layer_passes']:.1f}",
        "" if is_estimate else f"{peak:.0f}",
        "" if is_estimate else f"{peak - loaded:.0f}",
    ]


def _ratios(median: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for slow, fast in _PAIRS:
        if slow in median and fast in median:
            wall = median[slow]["seconds"] / median[fast]["seconds"]
            cpu = median[slow]["cpu_seconds"] / median[fast]["cpu_seconds"]
            yield f"- {slow} / {fast}: {wall:.2f} in seconds, {cpu:.2f} in CPU seconds"


def _floor_parts(records: Sequence[Record]) -> Iterator[str]:
    """Report the floor without its forward pass, which only a choice of layers needs."""
    floors = _of(records, "floor")
    if not floors:
        return
    parts = {k: statistics.median(f["parts"][k] for f in floors) for k in floors[0]["parts"]}
    yield "- floor: " + ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())
    without = parts["svd"] + parts["backward"]
    for variant in ("one_shot", "iterative"):
        if runs := _of(records, variant):
            seconds = statistics.median(run["seconds"] for run in runs)
            yield f"- {variant} / floor without its forward: {seconds / without:.2f} in seconds"


def _agreement(records: Sequence[Record]) -> Iterator[str]:
    """Report how many components iterative and the reference both keep."""
    ours = _of(records, "iterative")
    for variant in ("reference_frozen", "reference_factors", "reference_all"):
        reference = _of(records, variant)
        if not (ours and reference and reference[0]["scale"] == 1):
            continue
        kept, other = (_pairs(runs[0]["kept"]) for runs in (ours, reference))
        same = sum((kept & other).values())
        yield f"- iterative keeps {same} of the {other.total()} components that {variant} keeps"


def _pairs(kept: Mapping[str, Sequence[int]]) -> Counter[tuple[str, int]]:
    return Counter((module, index) for module, indices in kept.items() for index in indices)


def _conditions(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    settings = records[0]["settings"]
    yield ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    machines = {f"{record['hardware']}, {record['threads']} threads" for record in records}
    yield "\n".join(sorted(machines))
    load = max(record["load_average"] for record in records)
    yield f"Load average before a measurement: at most {load:.1f}."


if __name__ == "__main__":
    sys.exit(exit_code(main))
