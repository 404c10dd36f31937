"""All files of a grid as text, by name."""

import json

from grasp_lightning.reporting.comparison.page import comparison_page
from grasp_lightning.reporting.comparison.plots import comparison_plots
from grasp_lightning.reporting.comparison.results import Comparison
from grasp_lightning.reporting.comparison.table import csv_text, markdown_text


def comparison_files(comparison: Comparison) -> dict[str, str]:
    """Return the table, the plots and the page; equal grids give equal bytes."""
    plots = comparison_plots(comparison)
    return {
        "comparison.json": json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n",
        "table.csv": csv_text(comparison),
        "table.md": markdown_text(comparison),
        **{name: plot.svg for name, plot in plots.items()},
        "compare.html": comparison_page(comparison, plots.values()),
    }
