"""A grid as one HTML page that needs no other file and no network."""

from collections.abc import Iterable

from grasp_lightning.reporting.comparison.columns import notes, text_table
from grasp_lightning.reporting.comparison.results import Comparison
from grasp_lightning.reporting.drawing import Plot
from grasp_lightning.reporting.page import Headline, data_uri, page_template
from grasp_lightning.reporting.tables import duration_text


def comparison_page(comparison: Comparison, plots: Iterable[Plot]) -> str:
    """Return the page; equal grids give equal text."""
    table = text_table(comparison)
    return page_template("compare.html.jinja").render(
        models=", ".join(dict.fromkeys(cell.model for cell in comparison.cells)),
        machine=comparison.machine,
        headlines=_headlines(comparison),
        columns=[(column.heading, column.kind) for column in table.columns],
        rows=table.rows,
        notes=notes(comparison),
        plots=[(plot, data_uri(plot)) for plot in plots],
    )


def _headlines(comparison: Comparison) -> list[Headline]:
    cells = comparison.cells
    methods = {(cell.method, cell.compensation) for cell in cells if not cell.is_dense}
    failed = sum(cell.error is not None for cell in cells)
    return [
        Headline("Cells", str(len(cells)), f"{failed} failed" if failed else ""),
        Headline("Methods", str(len(methods)), ""),
        Headline("Time", duration_text(comparison.seconds), "of all cells"),
    ]
