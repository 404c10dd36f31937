"""Measures how the time of a calibration grows with windows, their length, layers and processes.

Every measurement is a run of ``compress`` in processes of one thread each. Its result is appended
to the output at once; measurements in the output are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _common import DEFAULT_CACHE, exit_code, hardware, loadable_folder, markdown_table

from grasp_lightning.errors import GraspError

Record = dict[str, Any]  # a case, and its seconds by phase

_PHASES = ("similarity", "attribution", "factorize")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        windows: Number of calibration windows.
        seqlen: Tokens per window.
        layers: Number of layers that are replaced.
        processes: Number of processes, with one thread each.
    """

    windows: int = 16
    seqlen: int = 128
    layers: int = 8
    processes: int = 1


def cases() -> Iterator[Case]:
    """Yield all measurements: each one differs in one number from the first."""
    for processes in (1, 2):
        for windows in (16, 32, 64, 128):
            yield Case(windows=windows, processes=processes)
    for seqlen in (256, 512):
        yield Case(seqlen=seqlen)
    for layers in (2, 4, 16):
        yield Case(layers=layers)


def main() -> None:
    """Make the missing measurements, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for a converted model")
    parser.add_argument("--shrink", type=int, default=1, help="divide windows and seqlen by this")
    arguments = parser.parse_args()
    model = loadable_folder(arguments.model, arguments.cache)
    records = _read(arguments.output)
    for case in cases():
        small = Case(
            windows=case.windows // arguments.shrink,
            seqlen=case.seqlen // arguments.shrink,
            layers=max(case.layers // arguments.shrink, 1),
            processes=case.processes,
        )
        if not any(_is_of(record, small) for record in records):
            records.append(_measure(small, model))
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
    print(report(records))


def _read(output: Path) -> list[Record]:
    if not output.is_file():
        return []
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def _is_of(record: Record, case: Case) -> bool:
    return all(record[key] == value for key, value in asdict(case).items())


def _measure(case: Case, model: Path) -> Record:
    print(f"measuring {case}", flush=True)
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [
            *(sys.executable, "-m", "grasp_lightning", "compress"),
            f"--model.path={model}",
            "--method.name=grasp",
            f"--method.num_layers={case.layers}",
            "--calibration.source=pydoc",
            f"--calibration.num_samples={case.windows}",
            f"--calibration.seqlen={case.seqlen}",
            "--evaluation.source=pydoc",
            "--evaluation.num_samples=2",
            "--evaluation.seqlen=32",
            f"--trainer.devices={case.processes}",
            f"--output_dir={run}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise GraspError(f"{case} failed: {done.stderr.strip().splitlines()[-1]}")
        seconds = json.loads((run / "metrics.json").read_text())["seconds"]
    return {**asdict(case), **{phase: seconds[phase] for phase in _PHASES}}


def report(records: Sequence[Record]) -> str:
    """Return the table, as Markdown.

    Args:
        records: Cases with their seconds.

    Returns:
        The text.
    """
    header = ["windows", "tokens per window", "layers", "processes", *_PHASES, "sum"]
    keys = ("windows", "seqlen", "layers", "processes")
    rows = [
        [
            *(str(record[key]) for key in keys),
            *(f"{record[phase]:.1f}" for phase in _PHASES),
            f"{sum(record[phase] for phase in _PHASES):.1f}",
        ]
        for record in sorted(records, key=lambda record: [record[key] for key in reversed(keys)])
    ]
    return "\n".join([markdown_table(header, rows), "", "Seconds.", hardware()])


if __name__ == "__main__":
    sys.exit(exit_code(main))
