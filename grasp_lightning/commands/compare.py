"""``compare``: models by methods by sizes, in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grasp_lightning.commands.comparison_files import write_comparison
from grasp_lightning.comparison.collecting import collect
from grasp_lightning.comparison.folder import GridFolder, check_inputs
from grasp_lightning.comparison.grid import grid_cells, share_of, unknown_methods
from grasp_lightning.comparison.paper import read_paper
from grasp_lightning.comparison.running import GridRun
from grasp_lightning.config import CompareConfig
from grasp_lightning.config.compare import with_variables
from grasp_lightning.config.values import check_values
from grasp_lightning.reporting.comparison.results import Comparison


@dataclass(frozen=True, kw_only=True)
class CompareRun:
    """What one start of the command has reached.

    Attributes:
        folder: The output folder as the user named it.
        comparison: All cells; None if only a part of them was asked for.
        num_failed: Number of cells that failed.
    """

    folder: Path
    comparison: Comparison | None
    num_failed: int


def run_compare(config: CompareConfig, tell: Callable[[str], None]) -> CompareRun:
    """Run what is missing of a grid, and write its tables.

    A cell that fails is one of the results. A wrong configuration is a ``GraspError`` before
    anything runs. SIGINT and SIGTERM end all processes, and the next start continues.

    Args:
        tell: Shows one line of progress.
    """
    folder = GridFolder(with_variables(config))
    check_values(folder.config)
    cells = grid_cells(folder.config)
    own = share_of(cells, config.cells)
    paper = read_paper(folder.config.paper)
    check_inputs(folder, cells)
    for name in unknown_methods(config):
        tell(f"methods.{name}: there is no method {config.methods[name].name} yet; skipped")
    run = GridRun(folder, tell)
    run.run(own)
    comparison = None
    if config.cells is None:
        comparison = collect(folder, cells, run.failures, paper)
        write_comparison(comparison, folder.root)
    return CompareRun(folder=folder.root, comparison=comparison, num_failed=len(run.failures))
