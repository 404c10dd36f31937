import json
from pathlib import Path

import pytest
import yaml

from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics
from grasp_lightning.reporting.page import render_compensation_report
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.amend import amend_run
from tests.unit.reporting.compensation_example import CONFIG, example_compensation
from tests.unit.reporting.example import CONFIG as COMPRESS_CONFIG
from tests.unit.reporting.example import example_metrics, example_plan

SECTION = {
    "settings": {},
    "sha256": "0",
    "cost": None,
    "peak_memory_bytes": None,
    "corpora": {"wikitext2": {"perplexity": 31.25, "num_tokens": 4321}},
    "tasks": {},
    "mean_of_seven": None,
}


def finished_run(root: Path, metrics: CompensationMetrics | Metrics) -> Path:
    is_compensation = isinstance(metrics, CompensationMetrics)
    with RunFolder.open(root, CONFIG if is_compensation else COMPRESS_CONFIG) as run:
        if not is_compensation:
            run.write_text("plan.json", example_plan().to_json())
        run.write_json("metrics.json", metrics.to_dict())
        run.write_text("report.html", "old")
        with run.new_folder("model") as folder:
            (folder / "config.json").write_text("{}")
        run.finish()
    return root / "model"


def test_a_compensation_s_metrics_and_report_gain_the_section(tmp_path: Path) -> None:
    model = finished_run(tmp_path / "run", example_compensation())
    changed = amend_run(str(model), "evaluation", SECTION)
    assert changed == tmp_path / "run" / "metrics.json"
    stored = CompensationMetrics.from_dict(json.loads(changed.read_text()))
    assert stored == example_compensation(evaluation=SECTION)
    report = (tmp_path / "run" / "report.html").read_text()
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert report == render_compensation_report(stored, settings)
    assert "Evaluation of the compensated model" in report
    assert "wikitext2, 4,321 predicted tokens" in report
    assert not (tmp_path / "run" / ".lock").exists()


def test_an_earlier_section_of_a_compensation_is_merged(tmp_path: Path) -> None:
    model = finished_run(tmp_path / "run", example_compensation(evaluation=SECTION))
    changed = amend_run(str(model), "evaluation", {"sha256": "1"}, lambda old, new: {**old, **new})
    assert changed is not None
    assert json.loads(changed.read_text())["evaluation"] == {**SECTION, "sha256": "1"}


def test_a_compression_s_report_is_still_its_own(tmp_path: Path) -> None:
    model = finished_run(tmp_path / "run", example_metrics())
    changed = amend_run(str(model), "evaluation", SECTION)
    assert changed is not None
    assert Metrics.from_dict(json.loads(changed.read_text())).evaluation == SECTION
    assert "Evaluation of the compressed model" in (tmp_path / "run" / "report.html").read_text()


def test_a_damaged_compensation_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = finished_run(tmp_path / "run", example_compensation())
    (tmp_path / "run" / "metrics.json").write_text('{"train": "lora"}')
    assert amend_run(str(model), "evaluation", SECTION) is None
    assert "is not added to its run: not the metrics of a run: bytes is missing" in caplog.text
    assert (tmp_path / "run" / "report.html").read_text() == "old"
