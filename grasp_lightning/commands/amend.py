"""Later measurements of a run's model: sections of its metrics.json, shown in its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from grasp_lightning.errors import OutputError
from grasp_lightning.plan import Plan
from grasp_lightning.reporting.metrics import Metrics
from grasp_lightning.reporting.page import render_report
from grasp_lightning.run_folder import RunFolder

_MODEL_NAME = "model"
_METRICS_NAME = "metrics.json"


def amend_run(model: str, section: str, content: Mapping[str, Any]) -> Path | None:  # Any: JSON
    """Put a measurement into the metrics and the report of the run that made a model.

    Args:
        model: What the user measured; only the folder ``model`` of a finished run counts.
        section: Key of ``metrics.json``: ``evaluation`` or ``throughput``.
        content: Its plain values.

    Returns:
        The changed metrics.json; None if the model is of no run.

    Raises:
        OutputError: If the run's files are damaged.
    """
    folder = Path(model).expanduser().absolute()
    if folder.name != _MODEL_NAME or not (folder.parent / _METRICS_NAME).is_file():
        return None
    run = RunFolder.reopen(folder.parent)
    if run is None:
        return None
    with run:
        try:
            stored = json.loads(run.path(_METRICS_NAME).read_text(encoding="utf-8"))
            plan = Plan.from_json(run.path("plan.json").read_text(encoding="utf-8"))
            settings = yaml.safe_load(run.path("config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise OutputError(f"the run in {run.root} has unreadable files ({error})") from error
        metrics = Metrics.from_dict({**stored, section: dict(content)})
        scores_file = run.path("scores.safetensors")
        scores = load_file(scores_file) if scores_file.is_file() else {}
        run.write_text("report.html", render_report(metrics, plan, scores, settings))
        return run.write_json(_METRICS_NAME, metrics.to_dict())
