"""A grid as a job array on a real SLURM, and its table afterwards."""

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import save_tiny
from tests.integration.test_compare_command import TEXT, cells_of, compare, times, write_config
from tests.slurm.cluster import ROOT, Cluster, wait_until

pytestmark = pytest.mark.slurm

NUM_TASKS = 2


def test_an_array_runs_all_cells_and_the_same_command_writes_the_table(
    cluster: Cluster, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "tiny", max_position_embeddings=256)
    (tmp_path / "text.txt").write_text(TEXT)
    methods = {"drop": {"name": "drop"}}
    config = write_config(tmp_path / "grid.yaml", methods=methods, removed_ratios=[0.2])
    job = cluster.submit(
        ROOT / "configs" / "slurm" / "compare.sbatch",
        [f"--config={config}"],
        tmp_path / "%a.log",
        f"--array=1-{NUM_TASKS}",
        "--cpus-per-task=1",
        PYTHON=sys.executable,
        INPUTS=str(tmp_path),
    )

    def logs() -> list[str]:
        return [file.read_text() for file in sorted(tmp_path.glob("*.log"))]

    def states() -> list[str]:
        return re.findall(r"JobState=(\w+)", cluster.ask("scontrol", "show", "job", job.number))

    def explain() -> str:
        return "\n".join([*states(), *logs(), cluster.logs()])

    def has_ended() -> bool:
        return not {*states()} & {"PENDING", "RUNNING", "COMPLETING"}

    wait_until(has_ended, "the end of the array", explain, seconds=300)
    assert states() == ["COMPLETED"] * NUM_TASKS, explain()
    assert len(logs()) == NUM_TASKS
    numbers = [re.findall(r"^(\d+) cells?, 0 of", log, re.MULTILINE) for log in logs()]
    assert numbers == [["1"], ["1"]], explain()  # the dense model, and drop
    folder = tmp_path / "grid"
    assert not list(folder.glob("table*"))
    before = times(folder, "cells")

    code, output, errors = compare(config, tmp_path)
    assert code == 0, errors
    assert output.startswith("2 cells, 2 of them finished\n")
    assert times(folder, "cells") == before
    assert "drop" in (folder / "table.md").read_text()
    found = cells_of(config)
    assert len(found) == NUM_TASKS
    assert all(cell["error"] is None and cell["perplexity"]["Fox"] > 1 for cell in found.values())
