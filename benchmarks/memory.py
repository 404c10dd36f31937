"""Measures the peak memory of calibration and compensation, and compares it with the forecast.

Every measurement runs in fresh processes and is appended to the output at once; what is in the
output is not measured again.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from _common import (
    DEFAULT_CACHE,
    exit_code,
    hardware,
    loadable_folder,
    markdown_table,
    run_fresh,
)
from _memory_cases import Case, measure, measure_in_group, predict

from grasp_lightning.config import Strategy
from grasp_lightning.training.strategies import is_sharded_strategy

Record = dict[str, Any]  # a case, measured and predicted bytes by part

_MEGA = 1e6
# From this size on glibc gives memory back to the system at once. By default it raises this bound
# automatically and keeps freed memory: the resident set is then larger than the memory in use.
_RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def cases() -> Iterator[Case]:
    """Yield all measurements."""
    for batch_size, seqlen, num_layers in (
        *((1, 128, 4), (1, 512, 4), (4, 128, 8), (2, 256, 8)),
        *((2, 256, 30), (4, 256, 30)),
    ):
        yield Case(stage="calibration", batch_size=batch_size, seqlen=seqlen, num_layers=num_layers)
    shared = Case(stage="calibration", batch_size=1, seqlen=256, num_layers=8, num_processes=2)
    yield from (shared, replace(shared, strategy="fsdp"))
    for checkpointing in (False, True):
        small = Case(
            stage="compensation", batch_size=2, seqlen=128, rank=32, checkpointing=checkpointing
        )
        yield from (small, replace(small, seqlen=256, rank=256), replace(small, num_processes=2))
    for strategy in get_args(Strategy):
        if is_sharded_strategy(strategy):
            yield replace(small, checkpointing=False, num_processes=2, strategy=strategy)


def main() -> None:
    """Make the missing measurements, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    parser.add_argument("--shrink", type=int, default=1, help="divide seqlen and layers by this")
    parser.add_argument(
        "--keep_freed",
        action="store_true",
        help="let the allocator keep freed memory, as it does by default",
    )
    arguments = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", **({} if arguments.keep_freed else _RETURN_FREED)})
    model = str(loadable_folder(arguments.model, arguments.cache))
    records = _read(arguments.output)
    for case in cases():
        small = replace(
            case,
            seqlen=case.seqlen // arguments.shrink,
            num_layers=-(-case.num_layers // arguments.shrink),
        )
        if not any(_is_of(record, small) for record in records):
            records.append(_measure(small, model))
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
    print(report(records, predict(records, model)))


def _read(output: Path) -> list[Record]:
    if not output.is_file():
        return []
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def _is_of(record: Record, case: Case) -> bool:
    return all(record[key] == value for key, value in asdict(case).items())


def _measure(case: Case, model: str) -> Record:
    print(f"measuring {case}", flush=True)
    if case.num_processes == 1:
        return {**asdict(case), "bytes": run_fresh(measure, case, model)}
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(max_workers=case.num_processes, mp_context=context) as pool:
        running = [
            pool.submit(measure_in_group, case, model, rank, port)
            for rank in range(case.num_processes)
        ]
        peaks = [future.result() for future in running]
    return {**asdict(case), "bytes": peaks[0]}  # of rank 0; the others do the same


def report(records: Sequence[Record], predicted: Sequence[Mapping[str, int]]) -> str:
    """Return the tables, as Markdown.

    Args:
        records: Cases with measured bytes.
        predicted: Predicted bytes of every part, without libraries.

    Returns:
        The text.
    """
    pairs = list(zip(records, predicted, strict=True))
    libraries = [r["bytes"]["loaded"] - p["loaded"] for r, p in pairs]
    least, most = min(libraries) / _MEGA, max(libraries) / _MEGA
    beside = f"Interpreter, libraries and tokenizer take {least:.0f} to {most:.0f} MB more."
    lines = [
        _table("calibration", ("num_layers",), ("factorize", "attribution"), pairs),
        _table("compensation", ("rank", "checkpointing"), ("training",), pairs),
        f"MB, the model included. {beside}",
        hardware(),
    ]
    return "\n\n".join(lines)


def _table(
    stage: str,
    keys: Sequence[str],
    parts: Sequence[str],
    pairs: Sequence[tuple[Record, Mapping[str, int]]],
) -> str:
    keys = ("strategy", "num_processes", "batch_size", "seqlen", *keys)
    header = [key.removeprefix("num_") if key == "num_processes" else key for key in keys]
    for part in parts:
        header += [f"{part}: measured", "modeled", "difference"]
    rows = []
    for record, predicted in pairs:
        if record["stage"] != stage:
            continue
        row = [str(record[key]) for key in keys]
        libraries = record["bytes"]["loaded"] - predicted["loaded"]
        for part in parts:
            measured = record["bytes"][part] - libraries
            difference = round(predicted[part] / measured - 1, 2) + 0.0  # no "-0%"
            row += [f"{measured / _MEGA:.0f}", f"{predicted[part] / _MEGA:.0f}"]
            row.append(f"{difference:+.0%}")
        rows.append(row)
    return markdown_table(header, rows)


if __name__ == "__main__":
    sys.exit(exit_code(main))
