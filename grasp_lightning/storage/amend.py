"""Later measurements of a run's model: sections of its metrics.json, shown in its report."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grasp_lightning.errors import GraspError, OutputError, PlanError
from grasp_lightning.plan import Plan
from grasp_lightning.reading.tensors import read_tensors
from grasp_lightning.reading.text import read_json, read_text
from grasp_lightning.reading.yaml_text import read_yaml
from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics, RunMetrics
from grasp_lightning.reporting.page import render_compensation_report, render_report
from grasp_lightning.run_folder import RunFolder, names

logger = logging.getLogger(__name__)

Section = Mapping[str, Any]  # Any: values of JSON
Merge = Callable[[Section, Section], Section]


def amend_run(
    model: str, section: str, content: Section, merge: Merge | None = None
) -> Path | None:
    """Add a measurement to the metrics and the report of the run that made a model.

    If the run cannot be written, this only logs a warning: the measurement itself is not lost.

    Args:
        model: The measured model; only the folder ``model`` of a finished run counts.
        section: Key in ``metrics.json``: ``evaluation`` or ``throughput``.
        content: Plain values of the section.
        merge: Combines the section that is there with the new one; None replaces it.

    Returns:
        The changed metrics.json; None if no run made the model, or its run cannot be written.
    """
    folder = Path(model).expanduser().absolute()
    if folder.name != names.MODEL or not (folder.parent / names.METRICS).is_file():
        return None
    try:
        run = RunFolder.reopen(folder.parent)
        if run is None:
            return None
        with run:
            stored = _read_section(read_json, run.path(names.METRICS))
            earlier = stored.get(section)
            new = content if earlier is None or merge is None else merge(earlier, content)
            metrics, report = _rendered(run, {**stored, section: dict(new)})
            run.write_text(names.REPORT, report)
            return run.write_json(names.METRICS, metrics.to_dict())
    except (OutputError, PlanError) as error:
        logger.warning("%s of %s is not added to its run: %s", section, model, error)
        return None


def _rendered(run: RunFolder, stored: Section) -> tuple[RunMetrics, str]:
    """Return the metrics and the report of a run, from the content of its metrics.json."""
    settings = _read_section(read_yaml, run.path(names.CONFIG))
    if "train" in stored:  # by compensate, which decides nothing and has no plan
        trained = CompensationMetrics.from_dict(stored)
        return trained, render_compensation_report(trained, settings)
    scores_file = run.path(names.SCORES)
    plan = Plan.from_json(read_text(run.path(names.PLAN), OutputError))
    scores = read_tensors(scores_file, OutputError) if scores_file.is_file() else {}
    metrics = Metrics.from_dict(stored)
    return metrics, render_report(metrics, plan, scores, settings)


def _read_section(
    read: Callable[[Path, type[GraspError]], Any],  # Any: values of JSON or YAML
    file: Path,
) -> Section:
    found = read(file, OutputError)
    if not isinstance(found, dict):
        raise OutputError(f"{file} is damaged: expected keys and values")
    return found
