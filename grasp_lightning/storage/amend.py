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
from grasp_lightning.run_folder import RunFolder

logger = logging.getLogger(__name__)

Section = Mapping[str, Any]  # Any: values of JSON
Merge = Callable[[Section, Section], Section]

_MODEL_NAME = "model"
_METRICS_NAME = "metrics.json"


def _replace(earlier: Section, content: Section) -> Section:
    del earlier
    return content


def amend_run(model: str, section: str, content: Section, merge: Merge = _replace) -> Path | None:
    """Put a measurement into the metrics and the report of the run that made a model.

    A run that cannot be written gets one warning: the measurement itself is not lost by it.

    Args:
        model: What the user measured; only the folder ``model`` of a finished run counts.
        section: Key of ``metrics.json``: ``evaluation`` or ``throughput``.
        content: Its plain values.
        merge: Makes one section of the one that is there and the new one.

    Returns:
        The changed metrics.json; None if the model is of no run, or the run cannot be written.
    """
    folder = Path(model).expanduser().absolute()
    if folder.name != _MODEL_NAME or not (folder.parent / _METRICS_NAME).is_file():
        return None
    try:
        run = RunFolder.reopen(folder.parent)
        if run is None:
            return None
        with run:
            stored = _read_section(read_json, run.path(_METRICS_NAME))
            earlier = stored.get(section)
            new = content if earlier is None else merge(earlier, content)
            metrics, report = _rendered(run, {**stored, section: dict(new)})
            run.write_text("report.html", report)
            return run.write_json(_METRICS_NAME, metrics.to_dict())
    except (OutputError, PlanError) as error:
        logger.warning("%s of %s is not added to its run: %s", section, model, error)
        return None


def _rendered(run: RunFolder, stored: Section) -> tuple[RunMetrics, str]:
    """Return metrics and report of a run, from the content of its metrics.json."""
    settings = _read_section(read_yaml, run.path("config.yaml"))
    if "train" in stored:  # by compensate, which decides nothing and has no plan
        trained = CompensationMetrics.from_dict(stored)
        return trained, render_compensation_report(trained, settings)
    scores_file = run.path("scores.safetensors")
    plan = Plan.from_json(read_text(run.path("plan.json"), OutputError))
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
