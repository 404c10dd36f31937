"""Measures the CPU time of commands that need no model, and of the imports that others wait for.

Each measurement is a process of its own. ``--against`` also measures another
checkout, alternately with this one.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from _common import exit_code, hardware, markdown_table

from grasp_lightning.errors import GraspError

_HERE = Path(__file__).resolve().parents[1]
_BAD_INPUT = 2
# What Python runs, and the exit code of it.
_CASES: Final[Mapping[str, tuple[Sequence[str], int]]] = MappingProxyType(
    {
        "`--version`": (("cli.py", "--version"), 0),
        "`--help`": (("cli.py", "--help"), 0),
        "`compress --help`": (("cli.py", "compress", "--help"), 0),
        "`compensate --help`": (("cli.py", "compensate", "--help"), 0),
        "`compress`, an unknown key": (("cli.py", "compress", "--metod.name=grasp"), _BAD_INPUT),
        "`plan`, an unknown key": (("cli.py", "plan", "--metod.name=grasp"), _BAD_INPUT),
        "`plan`, a wrong value": (("cli.py", "plan", "--method.num_layers=few"), _BAD_INPUT),
        "imports of `plan`": (("-c", "import grasp_lightning.commands.plan"), 0),
        "imports of `compress`": (("-c", "import grasp_lightning.commands.compress"), 0),
        "imports of the process that verifies a saved model": (
            ("-c", "import grasp_lightning.models.reloading"),
            0,
        ),
    }
)


def main() -> None:
    """Measure all cases in rounds, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case")
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    arguments = parser.parse_args()
    checkouts = {} if arguments.against is None else {"before": arguments.against.resolve()}
    checkouts["now"] = _HERE
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(arguments.rounds + 1):
        for case in _CASES:
            for column, checkout in checkouts.items():
                measured = _cpu_seconds(case, checkout)
                if number > 0:  # the first one fills caches of files and of bytecode
                    seconds.setdefault((case, column), []).append(measured)
    print(report(seconds, list(checkouts)))


def _cpu_seconds(case: str, checkout: Path) -> float:
    """Return the CPU seconds, user and system, of one process."""
    words, expected = _CASES[case]
    if not (checkout / "cli.py").is_file():
        raise GraspError(f"--against {checkout}: expected a checkout, which has a cli.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        last = done.stderr.strip().splitlines()[-1:]
        raise GraspError(
            f"{case} of {checkout}: expected exit code {expected}, got {done.returncode} {last}"
        )
    return usage.ru_utime - earlier.ru_utime + usage.ru_stime - earlier.ru_stime


def report(seconds: Mapping[tuple[str, str], Sequence[float]], columns: Sequence[str]) -> str:
    """Return the table, as Markdown.

    Args:
        seconds: Measurements by case and column.
        columns: Names of the checkouts.

    Returns:
        The text.
    """
    rows = [
        [case, *(f"{statistics.median(seconds[case, column]):.2f}" for column in columns)]
        for case in _CASES
    ]
    rounds = len(next(iter(seconds.values())))
    note = f"Medians of {rounds} processes, user and system time."
    return "\n".join([markdown_table(["CPU seconds", *columns], rows), "", note, hardware()])


if __name__ == "__main__":
    sys.exit(exit_code(main))
